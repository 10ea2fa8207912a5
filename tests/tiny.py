"""Small models and tokenizers that several tests share."""

import json
import os
import re
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from model import checkpoint_writing, decoder
from model.config import DecoderConfig

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 320


def write_tokenizer(folder: Path, template: str = TEMPLATE) -> None:
    """A byte-level BPE tokenizer of 320 tokens, like SmolLM2's."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(["the model answers the question and stops"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token=special[0],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def rows_of_one(tokens_bt, valid_bt=None) -> dict:
    """The arrays of model/packing.py that `forward` takes, for one text per row. valid_bt: bool,
    False at padding."""
    b, t = tokens_bt.shape
    valid_bt = jnp.ones((b, t), bool) if valid_bt is None else valid_bt
    places_bt = jnp.broadcast_to(jnp.arange(t), (b, t))
    return {
        "tokens": jnp.asarray(tokens_bt),
        "positions": jnp.maximum(jnp.cumsum(valid_bt, axis=1) - 1, 0),
        "unfold": places_bt[:, None],
        "segments": jnp.asarray(valid_bt, jnp.int32)[:, None],
        "copies": places_bt[..., None],
    }


def config(**changes) -> DecoderConfig:
    fields = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_ids=(2,),
        initializer_range=0.2,
        model_type="llama",
    )
    return DecoderConfig(**fields | changes)


def params(config: DecoderConfig, seed: int = 0) -> decoder.Params:
    """Random fp32 parameters: normal(0, initializer_range), norms at one. Drawn by numpy, since JAX
    would compile a program for each shape."""
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones(leaf.shape)
        return jnp.asarray(rng.normal(0, config.initializer_range, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(drawn, decoder.abstract(config))


def write_checkpoint(folder: Path, seed: int = 0, **changes) -> str:
    """A random checkpoint with a tokenizer; returns its identity."""
    source = folder.parent / f"{folder.name}-tokenizer"
    write_tokenizer(source)
    c = config(**changes)
    return checkpoint_writing.save(str(folder), c, params(c, seed), str(source), {})


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


PROMPTS = [
    {"prompt": text}
    for text in (
        "Hello",
        "Name a colour.",
        "What is two and two?",
        "Write a line about rain.",
        "Why?",
        "List three animals that can swim.",
        "Say it again, slowly and clearly, please.",
    )
]


def xla_flags(devices: int) -> str:
    """XLA's flags of this process with so many simulated devices."""
    return re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]
