"""A run's own times beside the plan's."""

from collections.abc import Iterator
from pathlib import Path

from etils import epy

from scripts.plan.arithmetic import seconds
from scripts.plan.schedule import Plan
from sharding.errors import UserError
from stages.files.output import read_manifest

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    from model import checkpoint

# The file whose manifest tells, in each folder of the run.
FILES = {
    "held-out answers": ["heldout.samples.jsonl"],
    "sample": ["samples.jsonl"],
    "rank": ["ranked.jsonl"],
    "dpo": ["checkpoint"],
    "compare": ["against_start.json", "against_previous.json"],
    "kl": ["kl_to_start.json", "kl_to_previous.json"],
}


def taken(run: str, iterations: int) -> dict[str, list[float]]:
    """Seconds of each stage, one for each time it ran, as its manifest tells: from when it knows
    its input to when its output is whole. Of a stage that was stopped, the last sitting's."""
    found: dict[str, list[float]] = {}
    for folder in ["start", *(f"iteration_{k + 1}" for k in range(iterations))]:
        for stage, files in FILES.items():
            for name in files:
                if (seconds := _seconds(Path(run, folder, name))) is not None:
                    found.setdefault(stage, []).append(seconds)
    if not found:
        raise UserError(f"--compare {run}: no finished stages there: give a run's folder")
    return found


def _seconds(file: Path) -> float | None:
    if not file.is_dir():
        there = read_manifest(str(file))
        return there and there.seconds
    return checkpoint.read_manifest(str(file))["origin"].get("seconds")


def table(plan: Plan, run: str) -> Iterator[str]:
    took = taken(run, plan.recipe.iterations)
    yield f"{run}: seconds by the stages' manifests, which begin once Python's imports are done"
    yield "| stage | predicted | taken | predicted / taken | share of the roofline |"
    yield "|-|-|-|-|-|"
    whole = [0.0, 0.0]
    for stage in plan.stages():
        if stage.name not in took:
            continue
        mean = sum(took[stage.name]) / len(took[stage.name])
        predicted, work = plan.seconds(stage) - stage.imports, mean - stage.start
        ideal = seconds(stage.pieces, plan.on, stage.dtype).total
        share = f"{ideal / work:.0%}" if ideal and work > 0 else ""
        each = ", ".join(f"{t:.1f}" for t in took[stage.name])
        yield f"| {stage.name} | {predicted:.1f} | {each} | {predicted / mean:.2f} | {share} |"
        whole[0] += predicted * len(took[stage.name])
        whole[1] += sum(took[stage.name])
    yield f"| together | {whole[0]:.0f} | {whole[1]:.0f} | {whole[0] / whole[1]:.2f} | |"
