"""PairRM folders of small sizes with random weights."""

from pathlib import Path

from scripts import random_pairrm

TINY = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    position_buckets=16,
    max_position_embeddings=48,
)
MIDDLE = dict(
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=256,
    position_buckets=256,
    max_position_embeddings=512,
)


def write_pairrm(folder: Path, sizes: dict = TINY, seed: int = 0, pieces: int = 700, texts=None):
    model = random_pairrm.sentencepiece_model(pieces, texts or random_pairrm.demo_texts())
    return random_pairrm.write_pairrm(folder, sizes, model, seed)
