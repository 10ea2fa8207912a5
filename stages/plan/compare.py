"""A run's own times beside the plan's."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from stages.plan.arithmetic import seconds
from stages.plan.schedule import Plan
from stages.records import UserError

# What each stage writes last, in a folder of the run.
LAST = {"held-out answers": "heldout.samples.jsonl.manifest.json",
        "held-out, rank": "heldout.ranked.jsonl.manifest.json",
        "sample": "samples.jsonl.manifest.json", "rank": "ranked.jsonl.manifest.json",
        "pairs": "pairs.jsonl.manifest.json", "dpo": "checkpoint/manifest.json"}  # fmt: skip


def taken(run: str, iterations: int) -> dict[str, list[float]]:
    """Seconds of each stage, one for each time it ran: from when the step before it ended to when
    its last file was written. A run that stood still in between counts that too."""
    ends = []
    for folder in ["start", *(f"iteration_{k + 1}" for k in range(iterations))]:
        for stage, name in LAST.items():
            file = Path(run, folder, name)
            if folder == "start" and stage == "dpo":
                continue
            if file.exists():
                ends.append((file.stat().st_mtime, stage))
    if len(ends) < 2:
        raise UserError(f"--compare {run}: no finished stages there: give a run's folder")
    found: dict[str, list[float]] = {}
    ends.sort()
    for (before, _), (end, stage) in pairwise(ends):
        found.setdefault(stage, []).append(end - before)
    return found


def table(plan: Plan, run: str) -> Iterator[str]:
    took = taken(run, plan.recipe.iterations)
    yield f"{run}, seconds of a stage's time:"
    yield "| stage | predicted | taken | predicted / taken | share of the roofline |"
    yield "|-|-|-|-|-|"
    whole = [0.0, 0.0]
    for stage in plan.stages():
        if stage.name not in took:
            continue
        mean = sum(took[stage.name]) / len(took[stage.name])
        predicted, work = plan.seconds(stage), mean - stage.start
        ideal = seconds(stage.pieces, plan.on, stage.dtype).total
        share = f"{ideal / work:.0%}" if ideal and work > 0 else ""
        each = ", ".join(f"{t:.1f}" for t in took[stage.name])
        yield f"| {stage.name} | {predicted:.1f} | {each} | {predicted / mean:.2f} | {share} |"
        whole[0] += predicted * len(took[stage.name])
        whole[1] += sum(took[stage.name])
    yield f"| together | {whole[0]:.0f} | {whole[1]:.0f} | {whole[0] / whole[1]:.2f} | |"
