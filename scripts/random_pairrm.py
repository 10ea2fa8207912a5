"""A PairRM with random weights, in the layout of the hub: for tests and for the benchmark.

    python -m scripts.random_pairrm FOLDER       FOLDER and FOLDER-encoder, at PairRM's real size

llm-blender's own classes write it, so llm-blender can load it. The weights are drawn so that logits
spread over several units and attention is far from even. The ranker judges nothing.
"""

import dataclasses
import functools
import io
import json
import math
import sys
from pathlib import Path

import sentencepiece
import tyro
from sentencepiece import sentencepiece_model_pb2

from model.rankers.blender import import_blender
from sharding.errors import UserError
from stages.files.run import run_main

PROMPTS = Path(__file__).parent / "recipes" / "demo"
# microsoft/deberta-v3-large's config.json, PairRM's encoder.
LARGE = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    position_buckets=256,
    max_position_embeddings=512,
)
LARGE_VOCABULARY = 128000  # pieces; [MASK] and the four markers follow


def demo_texts() -> tuple[str, ...]:
    lines = [x for f in sorted(PROMPTS.glob("*.jsonl")) for x in f.read_text().splitlines()]
    return tuple(json.loads(line)["prompt"] for line in lines)


@functools.cache
def sentencepiece_model(
    pieces: int, texts: tuple[str, ...], vocabulary: int | None = None
) -> bytes:
    """A unigram model of this many pieces like DeBERTa-v3's (special pieces, normaliser), filled up
    to `vocabulary` with pieces that no text holds."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=pieces,
        model_type="unigram",
        character_coverage=0.9999,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for number in range(len(proto.pieces), vocabulary or 0):
        proto.pieces.add(piece=f"\ue000{number}", score=-100.0)
    return proto.SerializeToString()


def encoder_config(sizes: dict, vocab_size: int) -> dict:
    """A config.json like DeBERTa-v3's."""
    return {
        "model_type": "deberta-v2",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-7,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "pad_token_id": 0,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "relative_attention": True,
        "share_att_key": True,
        "type_vocab_size": 0,
        "vocab_size": vocab_size,
        **sizes,
    }


def write_pairrm(folder: Path, sizes: dict, model: bytes, seed: int = 0) -> Path:
    """Write `folder` in the published layout and its encoder into FOLDER-encoder. model: bytes of a
    sentencepiece model."""
    import safetensors.torch  # here, as the next two lines: seconds to load torch
    import torch
    from transformers import AutoModel, DebertaV2Config

    import_blender()  # before what it makes importable
    from llm_blender.pair_ranker.config import RankerConfig
    from llm_blender.pair_ranker.model_util import build_collator, build_ranker, build_tokenizer

    encoder = folder.parent / f"{folder.name}-encoder"
    encoder.mkdir(parents=True)
    (encoder / "spm.model").write_bytes(model)
    (encoder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    config = encoder_config(sizes, 1000)
    (encoder / "config.json").write_text(json.dumps(config))
    tokenizer = build_tokenizer(str(encoder))
    config["vocab_size"] = len(tokenizer) + 99
    (encoder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    network = AutoModel.from_config(DebertaV2Config(**config))
    safetensors.torch.save_model(network, str(encoder / "model.safetensors"))
    del network

    settings = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": str(encoder),
        "source_maxlength": 1224,
        "candidate_maxlength": 412,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    build_collator("pairranker", tokenizer, 1224, 412)  # adds the markers
    ranker_config = RankerConfig.from_dict(settings)
    ranker = build_ranker("pairranker", "deberta", str(encoder), None, ranker_config, tokenizer)
    generator = torch.Generator().manual_seed(seed + 1)
    # In a deep model, layers that add much and attend evenly would make all tokens' vectors equal.
    deep = sizes["num_hidden_layers"] > 8
    names = ("output.dense.weight", "query_proj", "key_proj", "head_layer.4.weight")
    factors = dict(zip(names, (0.3, 2.2, 2.2, 18) if deep else (1, 1.5, 1.5, 6)))
    with torch.no_grad():
        for name, tensor in ranker.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("LayerNorm.weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(0.2 * noise)
            else:
                factor = next((f for part, f in factors.items() if part in name), 1)
                tensor.copy_(factor * noise / math.sqrt(tensor.shape[1]))
    safetensors.torch.save_model(ranker, str(folder / "model.safetensors"))
    return folder


@dataclasses.dataclass
class Args:
    """A PairRM of the real size with random weights: 1.7 GB, and its encoder as much."""

    folder: tyro.conf.Positional[str]
    """Folder to write; the encoder goes into FOLDER-encoder."""


def main(args: Args) -> None:
    path = Path(args.folder).resolve()  # config.json names the encoder by its full path
    if path.exists():
        raise UserError(f"{args.folder} exists: choose another folder, or remove it")
    model = sentencepiece_model(700, demo_texts(), LARGE_VOCABULARY)
    write_pairrm(path, LARGE, model)


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
