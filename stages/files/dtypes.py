"""The dtype of computation that a stage settles on: `--dtype auto`, and what a run began with."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import numpy as np
from etils import epy

from sharding import processes
from sharding.errors import UserError
from stages.files.output import Manifest, refuse_other
from stages.files.provenance import Entry

with epy.lazy_imports():  # loads JAX, which --help does without
    from model import precision as precisions
    from sharding import mesh as meshes

Dtype = Literal["auto", "float32", "bfloat16"]
SETTLED = ("float32", "bfloat16")


def settle_dtype(manifest: Manifest, begun: Iterable[Manifest]) -> str:
    """The dtype that this run computes in. It takes the place of "auto" in the manifest, and is
    the same in all processes. A run that goes on keeps the dtype that it began with. A line says
    which dtype it is, unless the run is finished.

    begun: the manifests that lie where this run writes, finished or not, its own or another run's.
    """
    asked = manifest.arguments["dtype"]
    same = next((made for made in begun if _is_same_run(manifest, made)), None)
    dtype, why = asked, "asked for"
    if asked == "auto":
        platform = meshes.list_devices()[0].platform  # first, since this refuses a missing device
        dtype = same.arguments["dtype"] if same else precisions.resolved(asked, platform)
        # Process 0 has the files, and its CPU may differ from another's.
        first = processes.from_first(np.array([SETTLED.index(dtype), same is not None]))
        dtype = SETTLED[first[0]]
        why = "auto: this run began with it" if first[1] else "auto, for these devices"
    manifest.arguments = manifest.arguments | {"dtype": dtype}
    if same is None or same.seconds is None:
        print(f"computing in {dtype} ({why})")
    return dtype


def _is_same_run(manifest: Manifest, made: Manifest) -> bool:
    """Whether `made` describes the run of `manifest`; if that says "auto", any dtype will do."""
    dtype = manifest.arguments["dtype"]
    if dtype == "auto" and isinstance(made.arguments, dict):
        dtype = made.arguments.get("dtype")
    settled = dataclasses.replace(manifest, arguments=manifest.arguments | {"dtype": dtype})
    try:
        refuse_other(settled, made, "")
    except UserError:
        return False
    return dtype in SETTLED


def dtypes_of(made_of: list[Entry], stage: str) -> set[str]:
    """The dtypes that a stage computed in, by the entries that `provenance` gives."""
    tables = (entry["arguments"] for entry in made_of if entry["stage"] == stage)
    dtypes = {table.get("dtype") for table in tables if isinstance(table, dict)}
    return dtypes.intersection(SETTLED)
