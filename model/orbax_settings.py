"""Orbax, set to hold little and to read nothing large twice. Imported here alone."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from orbax.checkpoint import v1 as ocp

SMALL = 2**18  # elements of a chunk that is sooner read again than moved


@contextlib.contextmanager
def orbax(tree, partial: bool = False) -> Iterator[ModuleType]:
    """Orbax's v1 interface, set to hold little beside `tree`, a tree of arrays or of their shapes.
    Its defaults keep a second copy of everything.

    Host arrays are not copied first: we wait, so nothing changes them. Chunks of 64 MB go straight
    to files of their own; OCDBT would gather all of them in memory until the end. No more than the
    largest array is read ahead. `partial`: the tree may be a part of what was saved.
    """
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False  # trained fp32 weights shrink by 7%, for seconds
    # Some of Orbax's handlers put every array into pinned host memory at once on GPUs. XLA grants
    # 64 GB of it per process, and AdamW's state of 7B parameters takes 81 GiB.
    context.array.saving.enable_pinned_host_transfer = False
    context.array.saving.storage_options.chunk_byte_size = 64 * 2**20
    # From the shapes, since an abstract array has no nbytes.
    largest = max((4 * int(np.prod(x.shape)) for x in jax.tree.leaves(tree)), default=0)
    context.memory.read_concurrent_bytes = max(2**30, largest + 2**20)
    context.pytree.loading.partial_load = partial
    # Orbax warns at every save and load that there is no OCDBT. With a full disk, its threads and
    # TensorStore's print dozens of tracebacks beside the error that is raised.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unless_too_late
    with context:
        yield ocp


def _unless_too_late(unraisable) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def load_arrays(folder: epath.Path, shapes, partial: bool = False):
    """The arrays that were saved there, with the dtypes and shardings of `shapes`. `partial`: see
    `orbax`.

    A file holds a chunk of an array, and whoever needs a part of a chunk reads all of it. Where the
    shardings cut through chunks, as those of another mesh do, each device reads whole chunks, and
    the arrays are then moved among the devices, one at a time.
    """
    with orbax(shapes, partial) as ocp:
        saved = tree_leaves_with_path(ocp.metadata(folder).metadata)
        chunks = {keystr(path, simple=True): x.storage_metadata.chunk_shape for path, x in saved}

        def to_read(path, x):
            chunk = chunks.get(keystr(path, simple=True))
            if chunk is None or np.prod(chunk) < SMALL:
                return x
            return x.update(sharding=_whole_chunks(x.shape, x.sharding, chunk))

        leaves, tree = jax.tree.flatten(ocp.load(folder, tree_map_with_path(to_read, shapes)))
    for i, x in enumerate(jax.tree.leaves(shapes)):
        if leaves[i].sharding != x.sharding:
            leaves[i] = jax.block_until_ready(jax.device_put(leaves[i], x.sharding))
    return jax.tree.unflatten(tree, leaves)


def _whole_chunks(shape: tuple, sharding, chunk: tuple):
    """`sharding` where it cuts between chunks; else one that does, over the same devices."""
    parts_and_sizes = zip(shape, sharding.shard_shape(shape), chunk)
    if all(part == length or part % size == 0 for length, part, size in parts_and_sizes):
        return sharding
    left, parts = sharding.num_devices, []
    for length, size in zip(shape, chunk):
        into = (n for n in range(left, 0, -1) if left % n == 0 and length % (n * size) == 0)
        parts.append(next(into, 1))
        left //= parts[-1]
    names = [str(axis) for axis in range(len(parts))]
    devices = sharding.mesh.devices.reshape(*parts, left)
    return NamedSharding(Mesh(devices, (*names, "copies")), PartitionSpec(*names))
