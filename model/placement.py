"""Where the arrays of a training and of a sampling lie on a mesh: shapes with their shardings.

Nothing is allocated, and the mesh may be one without devices (`sharding.mesh.abstract_mesh`).
`sharding.table` prints what these give.
"""

import jax
import jax.numpy as jnp

from model import decoder, train
from model.config import DecoderConfig
from sharding.mesh import abstract, batch_shardings, replicated, tree_shardings


def parameters(config: DecoderConfig, mesh, dtype=jnp.float32) -> decoder.Params:
    """The stacked parameters."""
    shapes = decoder.abstract(config)
    placed = abstract(shapes, tree_shardings(mesh, decoder.logical_axes(config), shapes))
    return jax.tree.map(lambda x: x.update(dtype=dtype), placed)


def unstacked(params: decoder.Params) -> decoder.Params:
    """The same parameters as `decoder.unstack_layers` leaves them."""

    def of_layer(x):
        sharding = jax.NamedSharding(x.sharding.mesh, jax.P(*x.sharding.spec[1:]))
        return x.update(shape=x.shape[1:], sharding=sharding)

    count = params["layers"]["q"].shape[0]
    return params | {"layers": [jax.tree.map(of_layer, params["layers"])] * count}


def cache(config: DecoderConfig, mesh, rows: int, length: int, dtype=jnp.float32) -> list:
    """The KV cache: [(k_bkhs, v_bksh)] a layer."""
    shapes = jax.eval_shape(lambda: decoder.empty_cache(config, rows, length, dtype))
    return abstract(shapes, tree_shardings(mesh, [decoder.CACHE_AXES] * len(shapes), shapes))


def training(config: DecoderConfig, mesh, recipe: train.Recipe, batch: dict) -> dict:
    """By title, what a training holds beside what it computes. batch: arrays of model/packing.py,
    or their shapes."""
    params = parameters(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    tx = train.optimizer(recipe, total_steps=1)
    state = train.optimizer_shardings(tx, params, shardings, replicated(mesh))
    return {
        "parameters": params,
        "gradients": params,
        "optimizer state": abstract(jax.eval_shape(tx.init, params), state),
        "batch": abstract(batch, batch_shardings(mesh, batch)),
    }


def sampling(config: DecoderConfig, mesh, slots: int, length: int, dtype=jnp.float32) -> dict:
    """By title, what a sampler holds: parameters in the dtype of computation, and the cache of so
    many slots of `length` positions."""
    keys, values = zip(*cache(config, mesh, slots, length, dtype))
    return {
        "parameters": parameters(config, mesh, dtype),
        "cache": {"keys": list(keys), "values": list(values)},
    }
