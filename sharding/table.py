"""What lies where: the table of a run's arrays, their shardings and their bytes on a device.

    parameters       shape           dtype    cut along     copies   a device
    embed            32000×4096      float32  tensor, fsdp       1   131.1 MB

An array is anything with shape, dtype and a NamedSharding: real ones, or shapes on a mesh without
devices. `sections` are trees of them by their titles, e.g. of `decoder.abstract`.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class Row:
    """An array, or `count` alike."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    count: int
    bytes: int  # of all of them, each there once
    bytes_per_device: int
    copies: int  # how often the mesh holds each


def rows(tree) -> list[Row]:
    """A row for each array of the tree; those of a list that are alike share one."""
    found: dict[tuple, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        name = "/".join(key for key in keys if key)
        kind = name, x.shape, np.dtype(x.dtype), x.sharding
        found[kind] = found.get(kind, 0) + 1
    return [_row(*kind, count) for kind, count in found.items()]


def _row(name, shape, dtype, sharding, count) -> Row:
    whole = count * math.prod(shape) * dtype.itemsize
    part = count * math.prod(sharding.shard_shape(shape)) * dtype.itemsize
    copies = part * sharding.mesh.size // whole if whole else sharding.mesh.size
    return Row(name, tuple(shape), dtype.name, sharding.spec, count, whole, part, copies)


def bytes_per_device(tree) -> int:
    return sum(row.bytes_per_device for row in rows(tree))


def summary(mesh, sections: dict) -> str:
    """One line: the mesh, what a device holds, and how much of it other devices hold too."""
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    held = {title: bytes_per_device(tree) for title, tree in sections.items()}
    once = sum(row.bytes for tree in sections.values() for row in rows(tree))
    total = sum(held.values())
    text = ", ".join(f"{title} {size(n)}" for title, n in held.items())
    copied = 1 - once / (total * mesh.size)
    return f"mesh {sizes}: a device holds {size(total)} ({text}); {copied:.1%} of it is copies"


def table(mesh, sections: dict) -> str:
    """One line per array, and the summary under them."""
    lines: list[tuple[str, ...]] = []
    for title, tree in sections.items():
        lines.append((title, "shape", "dtype", "cut along", "copies", "a device"))
        for row in rows(tree):
            name = row.name if row.count == 1 else f"{row.count} × {row.name}"
            shape = "×".join(map(str, row.shape)) or "–"
            places = _text(row.spec), str(row.copies), size(row.bytes_per_device)
            lines.append((f"  {name}", shape, row.dtype, *places))
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "  ".join(
            cell.rjust(width) if i > 3 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    ]
    return "\n".join([*text, summary(mesh, sections)])


def _text(spec: PartitionSpec) -> str:
    parts = ["+".join(part) if isinstance(part, tuple) else part or "–" for part in spec]
    return ", ".join(parts) if any(spec) else "–"


def size(count: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"
