"""What lies where: the table of a run's arrays, their shardings and their bytes on a device.

    parameters       shape           dtype    cut along     copies   a device
    embed            32000×4096      float32  tensor, fsdp       1   131.1 MB

An array is anything with shape, dtype and a NamedSharding: real ones, or shapes on a mesh without
devices. `sections` are trees of them by their titles, e.g. of `decoder.abstract`.
"""

import dataclasses
import math
from collections import Counter

import jax
import numpy as np
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class ArrayRow:
    """An array, or `count` alike."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    count: int
    bytes: int  # of all of them, without copies
    bytes_per_device: int
    copies: int  # how many copies the mesh holds


def rows(tree) -> list[ArrayRow]:
    """A row for each array of the tree; equal arrays of a list share a row."""
    kinds: Counter[tuple] = Counter()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        kinds["/".join(filter(None, keys)), x.shape, np.dtype(x.dtype), x.sharding] += 1
    made = []
    for (name, shape, dtype, sharding), count in kinds.items():
        whole = count * math.prod(shape) * dtype.itemsize
        part = count * math.prod(sharding.shard_shape(shape)) * dtype.itemsize
        copies = part * sharding.mesh.size // whole if whole else sharding.mesh.size
        made.append(ArrayRow(name, shape, dtype.name, sharding.spec, count, whole, part, copies))
    return made


def bytes_per_device(tree) -> int:
    return sum(row.bytes_per_device for row in rows(tree))


def summary(mesh, sections: dict) -> str:
    """One line: the mesh, what a device holds, and how much of it other devices hold too."""
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    held = {title: bytes_per_device(tree) for title, tree in sections.items()}
    total, once = sum(held.values()), sum(row.bytes for row in rows(list(sections.values())))
    text = ", ".join(f"{title} {size(n)}" for title, n in held.items())
    copied = 1 - once / (total * mesh.size)
    return f"mesh {sizes}: a device holds {size(total)} ({text}); {copied:.1%} of it is copies"


def table(mesh, sections: dict) -> str:
    """One line per array, and the summary under them."""
    lines = []
    for title, tree in sections.items():
        lines.append((title, "shape", "dtype", "cut along", "copies", "a device"))
        for row in rows(tree):
            name = row.name if row.count == 1 else f"{row.count} × {row.name}"
            shape = "×".join(map(str, row.shape)) or "–"
            parts = ["+".join(p) if isinstance(p, tuple) else p or "–" for p in row.spec]
            cut = ", ".join(parts) if any(row.spec) else "–"
            places = cut, str(row.copies), size(row.bytes_per_device)
            lines.append((f"  {name}", shape, row.dtype, *places))
    widths = [max(map(len, column)) for column in zip(*lines)]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<<<>>", widths))
    return "\n".join([*(form.format(*line) for line in lines), summary(mesh, sections)])


def size(count: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"
