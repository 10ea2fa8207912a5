"""Beside a plan: a run's own times, and training on more chips."""

from collections.abc import Iterator
from pathlib import Path

from model import checkpoint
from scripts.plan import compile as compiler
from scripts.plan.schedule import Plan, Stage
from sharding.errors import UserError
from stages.files.output import read_manifest

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
    """Seconds of each stage, one for each time it ran, by its manifests: from when it knows its
    input to when its output is whole. Of a stage that was stopped, the last sitting's."""
    took: dict[str, list[float]] = {}
    for folder in ("start", *(f"iteration_{k + 1}" for k in range(iterations))):
        for stage, path in ((s, Path(run, folder, name)) for s in FILES for name in FILES[s]):
            if path.is_dir():
                seconds = checkpoint.read_manifest(str(path))["origin"].get("seconds")
            else:
                manifest = read_manifest(str(path))
                seconds = manifest and manifest.seconds
            if seconds is not None:
                took.setdefault(stage, []).append(seconds)
    if not took:
        raise UserError(f"--compare {run}: it has no finished stages: give a run's folder")
    return took


def comparison(plan: Plan, work: dict[str, dict], took: dict[str, list[float]]) -> Iterator[str]:
    yield "The run's own seconds, by its manifests; the shares are what --efficiency takes:"
    yield "| stage | predicted | taken | predicted / taken | share of the roofline |"
    yield "|-|-|-|-|-|"
    sums = [0.0, 0.0]
    for stage in (stage for stage in plan.stages() if stage.name in took):
        each, planned = took[stage.name], plan.seconds(stage, work)
        mean, predicted = sum(each) / len(each), planned["start"] + planned["work"]
        ideal = planned["work"] * plan.efficiency[stage.kind]
        share = f"{ideal / (mean - stage.start):.0%}" if mean > stage.start and ideal else ""
        seconds = ", ".join(f"{second:.1f}" for second in each)
        yield f"| {stage.name} | {predicted:.1f} | {seconds} | {predicted / mean:.2f} | {share} |"
        sums = [sums[0] + predicted * len(each), sums[1] + sum(each)]
    yield f"| together | {sums[0]:.0f} | {sums[1]:.0f} | {sums[0] / sums[1]:.2f} | |"


def scaling(plan: Plan) -> Iterator[str]:
    """A table of an optimizer step on this slice and on larger ones, each compiled."""
    batch, micro = plan.training.batch_size, plan.training.micro_batch_size
    yield f"A training step of {batch} pairs, in seconds:"
    yield "| chips | mesh | micro-batch | GiB | products | exchange | cycles | step | of linear |"
    yield "|-|-|-|-|-|-|-|-|-|"
    steps = []
    for factor in (1, 4, 16, 64):
        larger, count = plan.on_more(factor), min(batch, micro * factor)
        tensor = max(1, larger.on.size // batch)  # a pair is cut where chips outnumber the pairs
        mesh = (1, larger.on.size // tensor, tensor)
        larger = larger.changed("dpo", mesh=mesh, micro_batch_size=count)
        asked = [each for each in larger.programs() if each["build"] == "gradients"]
        (told,) = compiler.described(larger.on.devices(), asked, True)
        took = larger.seconds(Stage("", "dpo", 1, {"": batch / count}, 0.0), {"": told})
        steps.append(took["work"])
        size = "refused" if "refused" in told else f"{sum(told['parts'].values()) / 2**30:.1f}"
        names = ("products", "exchange", "cycles", "work")
        cells = [str(larger.on), "×".join(map(str, mesh)), str(count), size]
        cells += [f"{took[name]:.2f}" for name in names] + [f"{steps[0] / steps[-1] / factor:.0%}"]
        yield "| " + " | ".join(cells) + " |"
