"""Check, before hours of sampling, that a run can go on to its end.

    python -m scripts.ready runs/demo --iterations 3 --ranker reward.py:reward

Fails with one line unless the ranker opens and the disk has room for what the run still writes.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

import tyro

from model.rankers.opening import open_ranker
from model.weights import read_json
from sharding.errors import UserError
from stages.files.run import run_main


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[str]
    """The run's folder, runs/NAME, with start/checkpoint in it."""
    ranker: str
    """The ranker, as stages.rank takes it."""
    iterations: int = 3
    """How many iterations the run will have."""


def main(args: Args) -> None:
    open_ranker(args.ranker)
    run = Path(args.run)
    manifest = read_json(run / "start/checkpoint/manifest.json", "make the checkpoint again")
    size = 4 * manifest["parameters"]  # bytes of a checkpoint, which is float32
    missing = sum(
        not (run / f"iteration_{k}/checkpoint").exists() for k in range(1, args.iterations + 1)
    )
    # The checkpoints, which stay; two of DPO's states (parameters and two moments each) during a
    # training, since a state is removed only when the next one is whole; and the export.
    needed = missing * size + (6 * size if missing else 0) + size
    free = shutil.disk_usage(run).free
    print(f"disk: up to {needed / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB are free")
    if needed > free:
        raise UserError(
            f"{run}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: make room, "
            "or put runs/ on a larger disk (a symbolic link will do)"
        )


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
