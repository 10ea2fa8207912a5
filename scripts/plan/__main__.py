"""What a recipe takes on a machine, before one is rented: memory, time and money.

    python -m scripts.plan snorkel-mistral-7b --machine v5p-8 --price 4.20

The stages' real programs are compiled for the machine by its own compiler (scripts/plan/setup.sh),
which takes minutes and gigabytes for 7B. Without it, activations are left out. Time is what a
program is bound by (products, reading memory once, or exchange) over the stage's efficiency; on a
TPU at least the cycles that its compiler estimates. Exit code 2 if a program does not fit.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import tyro
from etils import epy

from sharding.errors import UserError
from stages.files.run import run_main

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    from model import checkpoint, gguf, hf, weights
    from scripts import recipe as recipes
    from scripts.bench import shapes
    from scripts.plan import compile as compiler
    from scripts.plan import schedule, slices
    from stages.files import output, rows

GIB = 2**30


@dataclasses.dataclass
class Args:
    recipe: tyro.conf.Positional[str]
    """A name in scripts/recipes/, or a file."""
    machine: str = "cpu"
    """One of the recipe's machines, or a topology (v5e:2x4, v5p:2x2x1, v6e:4x4, a100-40:8,
    a100-80:8, h100:8, h200:1), or cpu: this computer."""
    price: float | None = None
    """Dollars per chip and hour."""
    efficiency: tuple[str, ...] = ()
    """The share of the roofline that a stage reaches: sample=0.5 rank=0.3 dpo=0.4 kl=0.4. Default:
    assumed on accelerators, measured on a CPU."""
    prompts: int | None = None
    """Prompts per iteration. Default: counted in local files, otherwise 20,000."""
    lengths: tuple[float, float, float] | None = None
    """Tokens of a mean prompt, a mean answer and the longest prompt. Default: prompts as in local
    files, otherwise 195 (UltraFeedback's) and 4,096; answers 420 (Mistral-7B-Instruct-v0.2's to
    AlpacaEval), at most 0.58 of max_new_tokens (the demo's)."""
    compare: str | None = None
    """A run's folder: also show what each stage took there."""
    scaling: bool = False
    """Also show a training step on 4, 16 and 64 times as many chips."""


def main(args: Args) -> None:
    plan = make(args)
    took = args.compare and taken(args.compare, plan.recipe.iterations)
    compiles = compiler.installed(plan.on.compiler)
    assumptions(plan)
    if compiles:
        print("compiling (minutes, for a large model)", file=sys.stderr)
    told = compiler.described(plan.on, plan.programs(), compiles)
    work = {each["name"]: each for each in told}
    show("GiB per chip, at the longest texts that are allowed:", memory_table(plan, work))
    if not compiles:
        print("Activations and exchange are left out: the machine's compiler is not installed. To")
        print(f"install it: bash scripts/plan/setup.sh {plan.on.compiler}\n")
    show("Seconds; products, memory and exchange are lower bounds:", time_table(plan, work))
    hours = plan.hours(work)
    cost = f", {hours * plan.on.size * args.price:,.0f} dollars" if args.price else ""
    print(f"the whole run: {hours:.3g} hours, {hours * plan.on.size:.3g} chip-hours{cost}\n")
    if args.scaling:
        show("Seconds of a training step:", scaling(plan))
    if took:
        show("Seconds of the run, by its manifests:", comparison(plan, work, took))
    if too_large := [each for each in told if not fits(each, plan)]:
        raise UserError(refusal(plan, too_large[0], compiles))


def make(args: Args) -> "schedule.Plan":
    values = {"prompts": [args.prompts], "price": [args.price], "lengths": args.lengths or []}
    for name, numbers in values.items():
        if not all(x is None or 0 < x < math.inf for x in numbers):
            raise UserError(f"--{name} {' '.join(map(str, numbers))}: it must be above 0")
    named = args.machine != "cpu" and ":" not in args.machine
    recipe = recipes.read(args.recipe, args.machine if named else "")
    on = slices.parse(recipe.machine.get("plan", "cpu") if named else args.machine)
    # About four characters a token, and the template.
    tokens = [size / 4 + 30 for size in characters(recipe, 1)]
    mean = sum(tokens) / len(tokens) if tokens else 195.0
    answer = min(420.0, 0.58 * recipe.sample.get("max_new_tokens", 256))
    return schedule.Plan(
        recipe,
        model_config(recipe.model),
        on,
        prompts=args.prompts or len(tokens) or 20000,
        heldout=len(characters(recipe, 0)) or 1000,
        lengths=args.lengths or (mean, answer, max(tokens, default=4096.0)),
        efficiency=schedule.efficiencies(args.efficiency, on),
    )


def characters(recipe, iteration: int) -> list[int]:
    """The length of each prompt of an iteration (0: the held-out ones), if in a local file."""
    file, split, first, last = recipe.source(iteration)
    if split is not None or not file.endswith(".jsonl"):
        return []
    return [len(row.prompt) for row in rows.read(file, rows.Prompt)][first:last]


def model_config(model: str) -> "schedule.DecoderConfig":
    """The config of a recipe's model."""
    kind, _, name = model.partition(":")
    if kind == "gguf":
        return gguf.read_config(gguf.find(name))
    if kind == "checkpoint":
        return checkpoint.load_config(name)
    if model == "mistralai/Mistral-7B-Instruct-v0.2":  # needs no hub
        return shapes.MISTRAL_7B
    files = ["config.json", "generation_config.json"]
    return hf.read_config(weights.local_folder(model, files)[0])


# ------------------------------------------------------------------------------- memory


def fits(told: dict, plan) -> bool:
    return "refused" not in told and sum(told["parts"].values()) <= plan.on.chip.memory


def refusal(plan, told: dict, compiles: bool) -> str:
    """One line: why a program does not fit, and what would make it fit."""
    parts = sorted(told["parts"].items(), key=lambda part: -part[1])
    why = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    why = f"{told.get('refused', why)}; a chip of {plan.on} has {plan.on.chip.memory / GIB:.1f} GiB"
    for changed, flags in changes(plan, told["name"].partition(":")[0]):
        program = [each for each in changed.programs() if each["name"] == told["name"]]
        # Parameters, moments and caches are known at once, before a compilation.
        known = (compiler.described(changed.on, program, c) for c in {False, compiles})
        if all(fits(*new, changed) for new in known):
            return f"{told['name']} does not fit ({why}): {changed.on} fits with {flags}"
    return f"{told['name']} does not fit ({why}), nor on 64 times as many chips"


def changes(plan, stage: str) -> Iterator[tuple]:
    """The plan with other flags of the stage, and these flags; then the same on more chips."""
    for factor, cut in itertools.product((1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8)):
        flags = {"slots": max(1, plan.slots // cut)}
        if stage == "dpo":
            micro = max(1, plan.training.micro_batch_size // cut)
            flags = {"remat": "full", "micro_batch_size": micro, "optimizer": "rmsprop"}
        told = " ".join(f"--{name.replace('_', '-')} {x}" for name, x in flags.items())
        yield plan.on_more(factor).changed(stage, **flags), told


# ------------------------------------------------------------------------------- tables


def show(title: str, rows: Iterable[list[str]]) -> None:
    rows = list(rows)
    print(title)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    print(flush=True)


def assumptions(plan) -> None:
    on, chip, (prompt, answer, _) = plan.on, plan.on.chip, plan.lengths
    rates = f"{chip.bf16 / 1e12:.3g} TFLOP/s bf16, {chip.fp32 / 1e12:.3g} fp32"
    more = f"{chip.read / 1e9:.0f} GB/s memory, {on.exchange / 1e9:.0f} exchange"
    told = ", ".join(f"{name} {value:.0%}" for name, value in plan.efficiency.items())
    prompts = f"{plan.prompts:,} prompts of {prompt:.0f} tokens, {plan.heldout:,} held out"
    print(f"{plan.recipe.name} on {on}: {on.size} chips, {on.hosts} hosts; a chip: {rates}, {more}")
    print(f"{plan.parameters:,} parameters; {prompts}; {plan.sampling.n} answers of {answer:.0f}")
    dtypes = f"sample in {plan.sampling.dtype}, dpo in {plan.training.dtype}"
    origin = "measured in float32" if on.compiler == "cpu" else "assumed"
    print(f"{dtypes}; share of the roofline ({origin}, or as you gave it): {told}\n", flush=True)


def memory_table(plan, work: dict[str, dict]) -> Iterator[list[str]]:
    columns = ("parameters", "moments", "gradients", "cache", "temporary", "together")
    yield ["program", *columns, "of", ""]
    for told in work.values():
        sizes = told["parts"] | {"together": sum(told["parts"].values())}
        cells = [f"{sizes[p] / GIB:.2f}" if p in sizes else "" for p in columns]
        verdict = "fits" if fits(told, plan) else "does not fit"
        yield [told["name"], *cells, f"{plan.on.chip.memory / GIB:.1f}", verdict]


def time_table(plan, work: dict[str, dict]) -> Iterator[list[str]]:
    columns = ("start", "products", "memory", "exchange", "cycles", "work")
    yield ["stage", "times", *columns]
    for stage in plan.stages():
        took = plan.seconds(stage, work)
        yield [stage.name, str(stage.times), *(f"{took[name]:.0f}" for name in columns)]


# ------------------------------------------------------------ a run beside it, and more chips

# Stage → files whose manifests tell its seconds, in each folder of the run.
FILES = {
    "held-out answers": ["heldout.samples.jsonl"],
    "sample": ["samples.jsonl"],
    "rank": ["ranked.jsonl"],
    "dpo": ["checkpoint"],
    "compare": ["against_start.json", "against_previous.json"],
    "kl": ["kl_to_start.json", "kl_to_previous.json"],
}


def taken(run: str, iterations: int) -> dict[str, list[float]]:
    """Seconds of each stage, one for each time it ran, by its manifests: from knowing its input
    to the whole output. If a stage was stopped, these are the seconds since it last went on."""
    took: dict[str, list[float]] = {stage: [] for stage in FILES}
    for folder in ("start", *(f"iteration_{k + 1}" for k in range(iterations))):
        for stage, path in ((s, Path(run, folder, name)) for s in FILES for name in FILES[s]):
            if path.is_dir():
                seconds = checkpoint.read_manifest(str(path))["origin"].get("seconds")
            else:
                seconds = getattr(output.read_manifest(str(path)), "seconds", None)
            took[stage] += [] if seconds is None else [seconds]
    if not any(took.values()):
        raise UserError(f"--compare {run}: it has no finished stages: give a run's folder")
    return took


def comparison(plan, work: dict, took: dict[str, list[float]]) -> Iterator[list[str]]:
    yield ["stage", "predicted", "taken", "predicted / taken", "share of the roofline"]
    sums = [0.0, 0.0]
    for stage in (stage for stage in plan.stages() if took[stage.name]):
        each, planned = took[stage.name], plan.seconds(stage, work)
        mean, predicted = sum(each) / len(each), planned["start"] + planned["work"]
        ideal = planned["work"] * plan.efficiency[stage.kind]
        share = f"{ideal / (mean - stage.start):.0%}" if mean > stage.start and ideal else ""
        seconds = ", ".join(f"{second:.1f}" for second in each)
        yield [stage.name, f"{predicted:.1f}", seconds, f"{predicted / mean:.2f}", share]
        sums = [sums[0] + predicted * len(each), sums[1] + sum(each)]
    yield ["together", f"{sums[0]:.0f}", f"{sums[1]:.0f}", f"{sums[0] / sums[1]:.2f}", ""]


def scaling(plan) -> Iterator[list[str]]:
    """A row for an optimizer step on this slice, and on larger ones, each compiled."""
    batch, micro, steps = plan.training.batch_size, plan.training.micro_batch_size, []
    names = ("products", "exchange", "cycles", "work")
    yield ["chips", "mesh", "micro-batch", "GiB", *names, "of linear"]
    for factor in (1, 4, 16, 64):
        larger, count = plan.on_more(factor), min(batch, micro * factor)
        tensor = max(1, larger.on.size // batch)  # a pair is cut where chips outnumber the pairs
        mesh = (1, larger.on.size // tensor, tensor)
        larger = larger.changed("dpo", mesh=mesh, micro_batch_size=count)
        asked = [each for each in larger.programs() if each["build"] == "gradients"]
        (told,) = compiler.described(larger.on, asked, True)
        took = larger.seconds(schedule.Stage("", "dpo", 1, {"": batch / count}, 0.0), {"": told})
        steps.append(took["work"])
        size = "refused" if "refused" in told else f"{sum(told['parts'].values()) / GIB:.1f}"
        cells = [str(larger.on), "×".join(map(str, mesh)), str(count), size]
        share = f"{steps[0] / steps[-1] / factor:.0%}"
        yield [*cells, *(f"{took[name]:.2f}" for name in names), share]


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
