"""What a recipe takes on a machine, before one is rented: memory, time and money.

    python -m scripts.plan snorkel-mistral-7b --machine v5p-8 --price 4.20

The stages' real programs are compiled for the machine by its own compiler, which needs no such
machine: scripts/plan/setup.sh installs it. That takes minutes and gigabytes for 7B. Without the
compiler, activations are left out. Time is what a program is bound by (products, reading memory
once, or exchange) over the stage's efficiency, and on a TPU at least the cycles that its compiler
estimates. Exit code 2, with the reason and a way out, if a program does not fit.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator

import tyro
from etils import epy

from sharding.errors import UserError
from stages.files.run import run_main

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    from model import checkpoint, gguf, hf
    from model import config as configs
    from model import weights as model_weights
    from scripts import recipe as recipes
    from scripts.plan import compile as compiler
    from scripts.plan import reports, schedule, slices
    from stages.files import rows

GIB = 2**30
PARTS = ("parameters", "moments", "gradients", "cache", "temporary")


@dataclasses.dataclass
class Args:
    recipe: tyro.conf.Positional[str]
    """A name in scripts/recipes/, or a file."""
    machine: str = "cpu"
    """One of the recipe's machines, or a topology: v5e:2x4, v5p:2x2x1, v6e:4x4, a100-40:8,
    a100-80:8, h100:8, h200:1, or cpu, this computer."""
    price: float | None = None
    """Dollars per chip and hour."""
    efficiency: tuple[str, ...] = ()
    """The share of the roofline that a stage reaches: sample=0.5 rank=0.3 dpo=0.4 kl=0.4. Default:
    assumed on accelerators, measured on a CPU."""
    prompts: int | None = None
    """Prompts per iteration. Default: counted in local files, otherwise 20,000."""
    prompt_tokens: float | None = None
    """Mean tokens of a prompt. Default: by the characters in local files, otherwise 195
    (UltraFeedback's with Mistral's tokenizer)."""
    answer_tokens: float | None = None
    """Mean tokens of an answer. Default: 420 (Mistral-7B-Instruct-v0.2's answers to AlpacaEval),
    but at most 0.58 of max_new_tokens (the demo's)."""
    longest_prompt: int = 4096
    """Tokens of the longest prompt, which the cache must hold, where no local files tell."""
    compare: str | None = None
    """A run's folder: also show what each stage took there."""
    scaling: bool = False
    """Also show a training step on 4, 16 and 64 times as many chips."""


def main(args: Args) -> None:
    plan = make(args)
    took = args.compare and reports.taken(args.compare, plan.recipe.iterations)
    kind = plan.on.devices()["kind"]
    compiles = compiler.installed(kind)
    show(assumptions(plan))
    if compiles:
        print("compiling (minutes, for a large model)", file=sys.stderr)
    programs = compiler.described(plan.on.devices(), plan.programs(), compiles)
    work = {told["name"]: told for told in programs}
    show(memory_table(plan, work))
    if not compiles:
        print("Activations and exchange are left out, for want of the machine's compiler. Install")
        print(f"it: bash scripts/plan/setup.sh {kind}\n")
    show(time_table(plan, work, args.price))
    if args.scaling:
        show(reports.scaling(plan))
    if took:
        show(reports.comparison(plan, work, took))
    if too_large := [told for told in work.values() if not fits(told, plan)]:
        raise UserError(refusal(plan, too_large[0], compiles))


def make(args: Args) -> "schedule.Plan":
    for name in ("prompts", "prompt_tokens", "answer_tokens", "price", "longest_prompt"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be above 0")
    named = args.machine != "cpu" and ":" not in args.machine
    recipe = recipes.read(args.recipe, args.machine if named else "")
    on = slices.parse(recipe.machine.get("plan", "cpu") if named else args.machine)
    # About four characters a token, and the template.
    tokens = [size / 4 + 30 for size in characters(recipe, 1)]
    mean = sum(tokens) / len(tokens) if tokens else 195.0
    return schedule.Plan(
        recipe,
        model_config(recipe.model),
        on,
        prompts=args.prompts or len(tokens) or 20000,
        heldout=len(characters(recipe, 0)) or 1000,
        prompt_tokens=args.prompt_tokens or mean,
        answer_tokens=args.answer_tokens or min(420, 0.58 * recipe.sample["max_new_tokens"]),
        longest_prompt=round(max(tokens, default=args.longest_prompt)),
        efficiency=schedule.efficiencies(args.efficiency, on),
    )


def characters(recipe, iteration: int) -> list[int]:
    """The length of each prompt of an iteration (0: the held-out ones), if in a local file."""
    file, split, first, last = recipe.source(iteration)
    if split is not None or not file.endswith(".jsonl"):
        return []
    return [len(row.prompt) for row in rows.read(file, rows.Prompt)][first:last]


# Mistral-7B-Instruct-v0.2's config.json: the plan of the published pipeline needs no hub.
MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
MISTRAL_7B = json.loads("""{
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768,
    "sliding_window": null, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2
}""")


def model_config(model: str) -> "configs.DecoderConfig":
    """Of a recipe's model."""
    kind, _, name = model.partition(":")
    if kind == "gguf":
        return gguf.read_config(gguf.find(name))
    if kind == "checkpoint":
        return checkpoint.load_config(name)
    if model == MISTRAL:
        return configs.from_hf(MISTRAL_7B)
    files = ["config.json", "generation_config.json"]
    return hf.read_config(model_weights.local_folder(model, files)[0])


# ------------------------------------------------------------------------------- memory


def fits(told: dict, plan) -> bool:
    return "refused" not in told and sum(told["parts"].values()) <= plan.on.chip.memory


def refusal(plan, told: dict, compiles: bool) -> str:
    """One line: why a program does not fit, and what would make it."""
    largest = sorted(told["parts"].items(), key=lambda part: -part[1])
    why = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest if size > GIB / 10)
    way = "64 times as many chips do not help"
    for changed, flags in changes(plan, told["name"].partition(":")[0]):
        program = [each for each in changed.programs() if each["name"] == told["name"]]
        # What lies in memory in any case is known at once, before a compilation.
        known = (compiler.described(changed.on.devices(), program, c) for c in {False, compiles})
        if all(fits(*new, changed) for new in known):
            way = f"{changed.on} fits with {flags}"
            break
    limit = f"a chip of {plan.on} has {plan.on.chip.memory / GIB:.1f} GiB"
    return f"{told['name']} does not fit ({told.get('refused', why)}; {limit}): {way}"


def changes(plan, stage: str) -> Iterator[tuple]:
    """The plan with other flags of the stage, and these flags; then the same on more chips."""
    for factor in (1, 2, 4, 8, 16, 32, 64):
        for cut in (1, 2, 4, 8):
            flags = {"slots": max(1, plan.slots // cut)}
            if stage == "dpo":
                micro = max(1, plan.training.micro_batch_size // cut)
                flags = {"remat": "full", "micro_batch_size": micro, "optimizer": "rmsprop"}
            told = " ".join(f"--{name.replace('_', '-')} {x}" for name, x in flags.items())
            yield plan.on_more(factor).changed(stage, **flags), told


# ------------------------------------------------------------------------------- tables


def show(lines: Iterator[str]) -> None:
    """Paragraphs and tables; the columns of a table are padded to read well on a screen."""
    table: list[list[str]] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        widths = [max(map(len, column)) for column in zip(*table)]
        for row in table:
            fill = "-" if set("".join(row)) == {"-"} else " "
            cells = [cell.rjust(width, fill) for cell, width in zip(row, widths)]
            print("| " + " | ".join([row[0].ljust(widths[0], fill), *cells[1:]]) + " |")
        table = []
        print(line, flush=True)


def assumptions(plan) -> Iterator[str]:
    on, chip = plan.on, plan.on.chip
    rates = f"{chip.bf16 / 1e12:.3g} TFLOP/s bf16, {chip.fp32 / 1e12:.3g} fp32"
    more = f"{chip.read / 1e9:.0f} GB/s memory, {on.exchange / 1e9:.0f} exchange"
    yield f"{plan.recipe.name} on {on}: {on.size} chips, {on.hosts} hosts; a chip: {rates}, {more}"
    prompts = f"{plan.prompts:,} prompts of {plan.prompt_tokens:.0f} tokens an iteration"
    answers = f"{plan.sampling.n} answers of {plan.answer_tokens:.0f} each"
    yield f"{plan.parameters:,} parameters; {prompts}, {answers}; {plan.heldout:,} held out"
    told = ", ".join(f"{name} {value:.0%}" for name, value in plan.efficiency.items())
    yield f"share of the roofline (assumed, or as you gave it): {told}"


def memory_table(plan, work: dict[str, dict]) -> Iterator[str]:
    yield "GiB per chip, at the longest texts that are allowed:"
    yield "| program | " + " | ".join(PARTS) + " | together | of | |"
    yield "|" + "-|" * (len(PARTS) + 4)
    for told in work.values():
        together = f"{sum(told['parts'].values()) / GIB:.2f}"
        cells = [f"{told['parts'][p] / GIB:.2f}" if p in told["parts"] else "" for p in PARTS]
        cells += ["refused" if "refused" in told else together, f"{plan.on.chip.memory / GIB:.1f}"]
        cells.append("fits" if fits(told, plan) else "does not fit")
        yield f"| {told['name']} | " + " | ".join(cells) + " |"


def time_table(plan, work: dict[str, dict], price: float | None) -> Iterator[str]:
    yield (
        f"Seconds of one time, in {plan.recipe.iterations} iterations; products, memory, exchange: "
        "the least that each takes; cycles: by the TPU's compiler"
    )
    columns = ("start", "products", "memory", "exchange", "cycles", "work")
    yield "| stage | times | " + " | ".join(columns) + " |"
    yield "|" + "-|" * (len(columns) + 2)
    for stage in plan.stages():
        took = plan.seconds(stage, work)
        cells = [f"{took[name]:.0f}" if took[name] else "" for name in columns]
        yield f"| {stage.name} | {stage.times} | " + " | ".join(cells) + " |"
    yield ""
    hours = plan.hours(work)
    cost = f", {hours * plan.on.size * price:,.0f} dollars at {price:g} each" if price else ""
    yield f"the whole run: {hours:.3g} hours, {hours * plan.on.size:.3g} chip-hours{cost}"


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
