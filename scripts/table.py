"""What the loop asks about a run: can it go on to its end, and did the model get better.

    python -m scripts.table show runs/demo --terms      the table of iterations
    python -m scripts.table ready runs/demo --iterations 3 --ranker reward.py:reward

The table is that of `python -m scripts.report`, whose page explains its columns. Rewards, words,
the
answers that the model ended itself and the distinct ones among them are means over the held-out
prompts; intervals are 95%.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import tyro

from model.rankers.opening import open_ranker
from scripts.report import gather, tables
from sharding.errors import UserError
from stages.files.run import run_main


@dataclasses.dataclass
class Show:
    """Print the table of a run's iterations so far."""

    run: tyro.conf.Positional[str]  # the run's folder, runs/NAME
    terms: bool = False  # also the reward's terms one by one, start and newest iteration


@dataclasses.dataclass
class Ready:
    """Fail unless the ranker opens and the disk has room for what the run will still write."""

    run: tyro.conf.Positional[str]  # the run's folder, with start/checkpoint in it
    ranker: str  # as stages.rank takes it
    iterations: int = 3  # how many there will be


def main(args: Show | Ready) -> None:
    (show if isinstance(args, Show) else check_ready)(args)


def show(args: Show) -> None:
    models = [model for model in gather.models(args.run) if model.rows]
    if not models or models[0].name != "start":
        raise UserError(f"{args.run}: no held-out answers of the start model yet: run the loop")
    print(tables.in_lines(tables.iterations(models)))
    first, last = models[0].terms(), models[-1].terms()
    if args.terms and first:
        print("\nThe reward's terms, means over the held-out answers:")
        for name in first:
            change = last[name] - first[name]
            print(f"  {name:<14} {first[name]:.3f} → {last[name]:.3f}  ({change:+.3f})")
    for line in tables.verdict(models):
        print(line)


# ------------------------------------------------------------------------- before it starts


def check_ready(args: Ready) -> None:
    """Before hours of sampling, not after them.

    Checkpoints are fp32. Beside the ones that stay, the dearest moment is a save of DPO's training
    state (parameters and two moments) while the one before it is still there.
    """
    try:
        open_ranker(args.ranker)
    except UserError as error:
        raise UserError(str(error)) from error
    run = Path(args.run)
    manifest = json.loads((run / "start/checkpoint/manifest.json").read_text())
    checkpoint = 4 * manifest["parameters"]
    missing = sum(
        not (run / f"iteration_{k}/checkpoint").exists() for k in range(1, args.iterations + 1)
    )
    needed = missing * checkpoint + (6 * checkpoint if missing else 0) + checkpoint  # + export
    free = shutil.disk_usage(run).free
    print(f"disk: up to {needed / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB are free")
    if needed > free:
        raise UserError(
            f"{run}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: make room, "
            "or put runs/ on a larger disk (a symbolic link will do)"
        )


if __name__ == "__main__":
    sys.exit(run_main(main, Show | Ready))
