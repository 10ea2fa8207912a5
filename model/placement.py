"""Where parameters lie on a mesh: shapes with their shardings.

Nothing is allocated, and the mesh may be one without devices (`sharding.mesh.abstract_mesh`).
`sharding.table` prints what these give. Other arrays: `arrays_held` of model/generate.py (sampling)
and model/train.py.
"""

import jax
import jax.numpy as jnp

from model import decoder
from model.config import DecoderConfig
from sharding.mesh import abstract, tree_shardings


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
