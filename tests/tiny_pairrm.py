"""PairRM folders of small sizes with random weights, and PairRM's own size without any."""

from pathlib import Path

import jax
import jax.numpy as jnp

from model import deberta, hf
from model.config import deberta_from_hf
from model.pairrm import TABLE, PairrmConfig, compare
from scripts import random_pairrm
from scripts.random_pairrm import LARGE, encoder_config

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            position_buckets=16, max_position_embeddings=48)  # fmt: skip
MIDDLE = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
              position_buckets=256, max_position_embeddings=512)  # fmt: skip


def write_pairrm(folder: Path, sizes: dict = TINY, seed: int = 0, pieces: int = 700, texts=None):
    model = random_pairrm.sentencepiece_model(pieces, texts or random_pairrm.demo_texts())
    return random_pairrm.write_pairrm(folder, sizes, model, seed)


def compile_compare(device, dtype, rows: int, length: int):
    """The memory analysis of `pairrm.compare` at PairRM's size, compiled for `device`."""
    config = PairrmConfig(deberta_from_hf(encoder_config(LARGE, 128005)))

    def abstract(shape, kind=dtype):
        return jax.ShapeDtypeStruct(shape, kind, sharding=device)

    params: dict = {"encoder": {"layers": [{} for _ in range(LARGE["num_hidden_layers"])]}}
    for key, slot in hf.table_slots(TABLE, LARGE["num_hidden_layers"]).items():
        shape = tuple(config.axis_sizes[letter] for letter in slot.our_axes)
        parent = params if key.startswith("head") else params["encoder"]
        for step in slot.path[:-1]:
            parent = parent[step]
        parent[slot.path[-1]] = abstract(shape, jnp.float32)
    params["encoder"] = jax.tree.map(
        lambda x: abstract(x.shape),
        jax.eval_shape(lambda p: deberta.prepare(p, config.encoder, dtype), params["encoder"]),
    )
    arguments = (
        abstract((rows, length), jnp.int32),
        abstract((rows,), jnp.int32),
        abstract((rows, 3), jnp.int32),
    )
    program = jax.jit(lambda params, *arrays: compare(params, config, *arrays))
    return program.lower(params, *arguments).compile().memory_analysis()
