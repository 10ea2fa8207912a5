"""The device mesh, the table from logical axes to mesh axes, and the helpers that apply it.

Parameters and activations are described by logical axis names ("embed", "heads", "batch", …); only
this file knows which mesh axis each of them lies on. The mesh always has three axes:

    data    copies of the model, each with its share of the batch
    fsdp    parameters, gradients and moments cut into shards; the batch is cut too
    tensor  heads, the MLP's width and the vocabulary cut, activations exchanged in each layer
"""

import math
import os
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.errors import UserError, first_line

MESH_AXES = ("data", "fsdp", "tensor")
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "act_embed": (),  # the width of an activation, whose batch is already cut along fsdp
    None: (),
}

# Of N simulated CPU devices, each holds a thread of XLA's pool while it waits in a collective, and
# the pool has one per core: with more devices than cores a collective can wait for good. XLA reads
# the pool's size from here when the first device is asked for.
if simulated := re.search(r"device_count=(\d+)", os.environ.get("XLA_FLAGS", "")):
    os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, 4 * int(simulated[1]))))


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over `devices` (default: all). One size may be -1: the rest. Raises UserError where
    the sizes do not multiply to the number of devices."""
    if jax.config.jax_enable_x64:  # a reward file or an importing program may set it
        raise UserError("JAX's jax_enable_x64 is on, which changes results: leave it off")
    devices = list_devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh {data},{fsdp},{tensor}: sizes are positive, one of them may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh {data},{fsdp},{tensor} does not cover the {len(devices)} devices: "
            "the product of the sizes must be their number"
        )
    # `jax.make_mesh` splits an axis of the chips' torus over two mesh axes on a v5e only, and
    # refuses such meshes elsewhere (8 along tensor on a v6e:4x4).
    placed_devices = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # The compiler propagates; jax's default of Explicit rejects top_k on a sharded axis.
    return Mesh(placed_devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def list_devices() -> list:
    """All processes' devices. Raises UserError where JAX cannot use the ones it is told to use."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: cuda without JAX's plugin
        platforms = os.environ.get("JAX_PLATFORMS")
        reason = first_line(error) if str(error) else "there is no such device"
        raise UserError(
            f"JAX_PLATFORMS={platforms}: {reason}: set it to what this machine has (cpu, cuda, tpu)"
            if platforms
            else f"JAX finds no device: {reason}"
        ) from None


def training_sizes(devices: int, config) -> tuple[int, int, int]:
    """The sizes of a training's mesh: everything is cut into as many shards as the model's width
    divides into, and the remaining devices hold copies. config: model.config's."""
    fsdp = math.gcd(devices, config.hidden_size)
    return devices // fsdp, fsdp, 1


def decoding_sizes(devices: int, config) -> tuple[int, int, int]:
    """The sizes of a sampling's mesh: heads and the MLP are cut as far as they divide, and the
    remaining devices hold copies. Along fsdp each token would collect all weights anew."""
    tensor = math.gcd(devices, config.num_key_value_heads, config.intermediate_size)
    return devices // tensor, 1, tensor


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry the logical names `axes`. A dimension
    that its mesh axes do not divide stays whole (3 key heads over 2 devices, say)."""
    parts = []
    for name, size in zip(axes, shape, strict=True):
        wanted = tuple(axis for axis in RULES[name] if mesh.shape[axis] > 1)
        divides = size % math.prod(mesh.shape[axis] for axis in wanted) == 0
        parts.append(wanted if divides else None)
    return PartitionSpec(*parts)


def placed(x, axes: tuple[str | None, ...], mesh) -> jax.ShapeDtypeStruct:
    """The array's shape and dtype with the sharding that its logical axes give it."""
    sharding = NamedSharding(mesh, spec(axes, x.shape, mesh))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def placed_batch(mesh, batch: dict) -> dict[str, jax.ShapeDtypeStruct]:
    """As `placed`, for a batch's arrays, whose first axis counts the rows of the batch."""
    return {name: placed(x, ("batch", *[None] * (x.ndim - 1)), mesh) for name, x in batch.items()}


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The batch on the mesh: each device gets only its rows. batch: whole, in every process."""
    return {
        name: jax.make_array_from_callback(x.shape, x.sharding, batch[name].__getitem__)
        for name, x in placed_batch(mesh, batch).items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """How many parts the mesh cuts a batch into; 1 for an empty mesh."""
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's sharding inside jit, by logical names. Does nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def by_axes(function: Callable, axes: tuple, out_axes: tuple) -> Callable:
    """`function` with each device computing its part of the results, for what the compiler cannot
    cut, such as a kernel. axes, out_axes: the logical axes of each argument and of each result.
    Without a mesh: the function itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def specs(axes, arrays):
        return tuple(spec(names, x.shape, mesh) for names, x in zip(axes, arrays, strict=True))

    def mapped(*arrays):
        where = specs(axes, arrays), specs(out_axes, jax.eval_shape(function, *arrays))
        cut = jax.shard_map(function, in_specs=where[0], out_specs=where[1], check_vma=False)
        return cut(*arrays)

    return mapped


def by_rows(function: Callable) -> Callable:
    """`function(weights, *arrays)` with each device computing its rows of the arrays (axis 0) with
    all weights, for what the compiler cannot cut, such as a kernel. Without a mesh: the function
    itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return function

    def mapped(weights, *arrays):
        rows = PartitionSpec(RULES["batch"])
        specs = (PartitionSpec(), *[rows] * len(arrays))
        cut = jax.shard_map(function, in_specs=specs, out_specs=rows, check_vma=False)
        return cut(weights, *arrays)

    return mapped
