"""The output of a stage that several processes run together: process 0 alone writes it."""

import json

import numpy as np

from sharding import processes
from sharding.errors import UserError
from stages.files.output import Manifest, Output


class Elsewhere:
    """Stands for the Output in the processes that do not write it."""

    finished = True

    def write(self, *_) -> None:
        pass

    set_aside = write


def open_output(
    path: str, manifest: Manifest, overwrite: bool, ids: list[str]
) -> tuple[Output | Elsewhere, list[str]]:
    """(the output, those of `ids` that are still to be made; none where it is finished), in all
    processes. Raises UserError where they read different inputs or models."""
    if not processes.agree(json.dumps(manifest.key())):
        raise UserError("the processes were given different inputs, models or rankers")
    output = Output.open(path, manifest, overwrite) if processes.is_first() else Elsewhere()
    is_made = processes.from_first(np.array([output.finished or output.has(i) for i in ids], bool))
    return output, [i for i, made in zip(ids, is_made) if not made]
