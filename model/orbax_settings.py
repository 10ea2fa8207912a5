"""Orbax, set to hold little beside the arrays. The only file that imports it."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp


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
    # On GPUs Orbax would put every array into pinned host memory at once, of which XLA grants 64 GB
    # per process: AdamW's state of 7B parameters takes 81 GiB.
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
