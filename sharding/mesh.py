"""The device mesh, the table from logical axes to mesh axes, and the two helpers that apply it.

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
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "act_embed": None,  # the width of an activation: its batch is cut already
}

# The compiler propagates; jax's default of Explicit rejects top_k on a sharded axis.
AXIS_TYPES = (AxisType.Auto,) * 3

# Of N simulated CPU devices, each holds a thread of XLA's pool while it waits in a collective, and
# the pool has one a core: with more devices than cores a collective can wait for good. XLA reads
# the pool's size from here when the first device is asked for.
if simulated := re.search(r"device_count=(\d+)", os.environ.get("XLA_FLAGS", "")):
    os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, 4 * int(simulated[1]))))


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of (data, fsdp, tensor) over `devices` (default: all). One size may be -1: the rest.

    Raises UserError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
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
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=AXIS_TYPES, devices=devices)


def abstract_mesh(sizes: tuple[int, int, int]) -> AbstractMesh:
    """A mesh of (data, fsdp, tensor) without devices: enough to say where things would lie."""
    return AbstractMesh(sizes, MESH_AXES, axis_types=AXIS_TYPES)


def training_sizes(devices: int, config) -> tuple[int, int, int]:
    """The mesh of a training for so many devices: everything cut into as many shards as the
    model's width divides into; what is left over holds copies.

    config: a model's, with transformers' names.
    """
    fsdp = math.gcd(devices, config.hidden_size)
    return devices // fsdp, fsdp, 1


def decoding_sizes(devices: int, config) -> tuple[int, int, int]:
    """The mesh of a sampling for so many devices: heads and the MLP cut as far as they divide, the
    rest holds copies. Along fsdp the weights would be collected anew for every token.

    config: a model's, with transformers' names.
    """
    tensor = math.gcd(devices, config.num_key_value_heads, config.intermediate_size)
    return devices // tensor, 1, tensor


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry the logical names `axes`.

    A dimension that its mesh axis does not divide stays whole (3 key heads over 2 devices, say).
    Raises ValueError for an unknown name, or when two dimensions ask for the same mesh axis.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} axis names {axes} for an array of shape {shape}")
    parts, taken = [], set()
    for name, size in zip(axes, shape):
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}: sharding/mesh.py lists them")
        wanted = RULES[name] if name is not None else None
        wanted = (wanted,) if isinstance(wanted, str) else (wanted or ())
        wanted = tuple(axis for axis in wanted if mesh.shape[axis] > 1)
        if taken & set(wanted):
            raise ValueError(
                f"logical axes {axes} put mesh axis {sorted(taken & set(wanted))} twice"
            )
        if wanted and size % math.prod(mesh.shape[axis] for axis in wanted) == 0:
            taken |= set(wanted)
            parts.append(wanted if len(wanted) > 1 else wanted[0])
        else:
            parts.append(None)
    return PartitionSpec(*parts)


def tree_shardings(mesh: Mesh, axes, arrays):
    """NamedShardings for a tree of arrays (or ShapeDtypeStructs), from its tree of axis names."""
    return jax.tree.map(
        lambda array, names: NamedSharding(mesh, spec(names, array.shape, mesh)), arrays, axes
    )


def abstract(arrays, shardings):
    """The arrays' shapes and dtypes with these shardings (jax.ShapeDtypeStruct)."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        arrays,
        shardings,
    )


def batch_shardings(mesh: Mesh, batch: dict) -> dict:
    """The shardings of a batch's arrays. Their first axis counts the rows of the batch."""
    axes = {name: ("batch", *(None,) * (x.ndim - 1)) for name, x in batch.items()}
    return tree_shardings(mesh, axes, batch)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The batch on the mesh, each device given its rows alone. Every process holds all of it."""
    return {
        name: jax.make_array_from_callback(batch[name].shape, sharding, batch[name].__getitem__)
        for name, sharding in batch_shardings(mesh, batch).items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh cuts a batch; 1 where none is set."""
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def free_memory(mesh: Mesh) -> int:
    """Bytes that are free on the mesh's devices together; simulated ones share the machine's."""
    devices = mesh.devices.flatten()
    if devices[0].platform == "cpu":
        return available_memory()
    stats = [device.memory_stats() for device in mesh.local_devices]
    free = min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    return free * len(devices)


def available_memory() -> int:
    """Bytes that new work on this machine may take: what is free and what the kernel gives back."""
    with open("/proc/meminfo") as file:
        line = next(line for line in file if line.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's sharding inside jit, by logical names; no mesh set, nothing done."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def by_rows(function: Callable) -> Callable:
    """`function(weights, *arrays)`, each device computing its rows of the arrays (axis 0) with all
    weights: for what the compiler cannot cut, such as a kernel. No mesh set: the function itself.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function

    def mapped(weights, *arrays):
        rows = PartitionSpec(RULES["batch"])
        specs = (PartitionSpec(), *[rows] * len(arrays))
        cut = jax.shard_map(function, in_specs=specs, out_specs=rows, check_vma=False)
        return cut(weights, *arrays)

    return mapped
