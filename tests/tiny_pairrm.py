"""PairRM folders of small sizes with random weights, and PairRM's own size without any."""

from pathlib import Path

import jax
import jax.numpy as jnp

from model import deberta, hf
from model.config import deberta_from_hf
from scripts import random_pairrm
from scripts.random_pairrm import LARGE, encoder_config

TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            position_buckets=16, max_position_embeddings=48)  # fmt: skip
MIDDLE = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
              position_buckets=256, max_position_embeddings=512)  # fmt: skip


def write_pairrm(folder: Path, sizes: dict = TINY, seed: int = 0, pieces: int = 700, texts=None):
    model = random_pairrm.sentencepiece_model(pieces, texts or random_pairrm.demo_texts())
    return random_pairrm.write_pairrm(folder, sizes, model, seed)


def compile_layer(device, dtype, rows: int, length: int):
    """(bytes of PairRM's encoder, the memory analysis of one of its layers), the layer compiled for
    `device` as PairRM calls it: layer by layer."""
    config = deberta_from_hf(encoder_config(LARGE, 128005))

    def abstract(shape, kind=dtype):
        return jax.ShapeDtypeStruct(shape, kind, sharding=device)

    params: dict = {"layers": [{} for _ in range(LARGE["num_hidden_layers"])]}
    for slot in hf.table_slots(deberta.TABLE, LARGE["num_hidden_layers"]).values():
        parent = params
        for step in slot.path[:-1]:
            parent = parent[step]
        shape = tuple(config.axis_sizes[letter] for letter in slot.our_axes)
        parent[slot.path[-1]] = abstract(shape, jnp.float32)
    ready = jax.eval_shape(lambda p: deberta.prepare(p, config, dtype), params)
    ready = jax.tree.map(lambda x: abstract(x.shape), ready)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(ready))
    x_btd = abstract((rows, length, LARGE["hidden_size"]))
    real_bt = abstract((rows, length), jnp.bool_)
    layer = deberta.layer.lower(ready["layers"][0], config, x_btd, real_bt).compile()
    return size, layer.memory_analysis()
