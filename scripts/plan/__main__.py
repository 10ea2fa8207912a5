"""What a recipe takes on a slice of chips, before one is rented: memory, time and money.

    python -m scripts.plan snorkel-mistral-7b --topology v5p:2x2x1 --price 4.20
    python -m scripts.plan demo --compare runs/demo
    python -m scripts.plan snorkel-mistral-7b --topology v5p:2x2x1 --scaling --arithmetic

For a TPU the stages' real programs are compiled by its real compiler, without a TPU (it needs
package libtpu, and takes minutes and gigabytes at 7B); for a GPU and this machine's CPU memory is
counted. Time is the roofline of what each stage multiplies, reads and exchanges, over the stated
efficiency. Exit code 2, with the reason and a way out, where a program does not fit.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator

import tyro

from scripts.plan import compare, fit, programs, published
from scripts.plan.arithmetic import DecoderCost, Lengths, seconds, total
from scripts.plan.recipe import LoopRecipe, model_config, read
from scripts.plan.schedule import Plan, efficiencies
from scripts.plan.slices import TORUS, Slice, parse
from sharding.chips import GIB
from sharding.errors import UserError
from stages.files.run import run_main


@dataclasses.dataclass
class Args:
    recipe: tyro.conf.Positional[str]
    """A name in scripts/recipes/ or a file; its environment variables count, LIMIT too."""
    topology: str | None = None
    """v5e:2x4, v5p:2x2x1, v6e:4x4, a100-40:8, a100-80:8, h100:8, h200:1 or cpu, this machine.
    Default: the recipe's PLAN, else cpu."""
    cpu_rates: tuple[float, float] | None = None
    """This CPU's fp32 products in GFLOP/s (scripts.bench gemm) and memory in GB/s, for one that is
    busy now. Default: measured."""
    price: float | None = None
    """Dollars a chip and hour."""
    efficiency: tuple[str, ...] = ()
    """The share of the roofline that a stage reaches: sample=0.5 rank=0.3 dpo=0.4 kl=0.4, or a JSON
    file of these, as `scripts.bench shares` writes on a CPU. Default: assumed on accelerators,
    measured on one CPU."""
    prompts: int | None = None
    """Prompts an iteration. Default: counted where the recipe has them in local files, else the
    published 20,000."""
    heldout: int | None = None
    """Held-out prompts. Default: counted likewise, else the published 1,000."""
    prompt_tokens: float | None = None
    """Mean length of a prompt. Default: a quarter of its characters and 30 tokens of template where
    it is known, else 195 (1,000 UltraFeedback prompts with Mistral's tokenizer)."""
    answer_tokens: float | None = None
    """Mean length of an answer. Default: 420 (Mistral-7B-Instruct-v0.2's answers to AlpacaEval), at
    most 0.58 of --max-new-tokens (the demo's, over all its iterations)."""
    longest_prompt: int = 4096
    """Tokens of the longest prompt, where the prompts are not known: the cache must hold it."""
    model: str | None = None
    """A folder or hub id with the model's config.json, where the recipe's own cannot be read."""
    arithmetic: bool = False
    """Count memory for a TPU too, instead of compiling."""
    compare: str | None = None
    """A run's folder: what each stage took there, beside the prediction."""
    published: bool = False
    """Also: what share of their peak the published run's training implies for 8 A100 or H100."""
    scaling: bool = False
    """Also: a training step on one host and on pods of 16, 64 and 256 chips."""


def main(args: Args) -> None:
    recipe = read(args.recipe)
    if args.cpu_rates and not all(0 < rate < math.inf for rate in args.cpu_rates):
        raise UserError("--cpu-rates: both must be above 0")
    try:
        rates = args.cpu_rates and (args.cpu_rates[0] * 1e9, args.cpu_rates[1] * 1e9)
        on = parse(args.topology or recipe.topology or "cpu", rates)
    except ValueError as error:
        raise UserError(f"--topology: {error}") from None
    source = recipe.start if args.model is None else ["", args.model, ""]
    plan = make(args, recipe, DecoderCost(model_config(source)), on)
    show(assumptions(plan))
    memory = fit.by_arithmetic(plan)
    how = "counted"
    if on.chip.name in TORUS and not args.arithmetic:
        print("compiling (minutes, for a large model)", file=sys.stderr)
        memory, how = programs.compiled(on, fit.compiler_work(plan)), "by the TPU's compiler"
    show(memory_table(plan, memory, how))
    show(time_table(plan, args.price))
    if args.published:
        show(published.published(plan.decoder))
    if args.scaling:
        show(published.scaling(plan))
    if args.compare is not None:
        show(compare.table(plan, args.compare))
    if refused := [m for m in memory if not fit.fits(m, on)]:
        raise UserError("does not fit: " + fit.refusal(refused[0], plan))


def make(args: Args, recipe: LoopRecipe, decoder: DecoderCost, on: Slice) -> Plan:
    for name in ("prompts", "heldout", "prompt_tokens", "answer_tokens", "price", "longest_prompt"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be above 0")
    tokens = tuple(round(characters / 4) + 30 for characters in recipe.prompts or ())
    if args.prompt_tokens:
        tokens = ()
    known = sum(tokens) / len(tokens) if tokens else 195.0
    limit = recipe.sample.max_new_tokens
    lengths = Lengths(
        prompt=args.prompt_tokens or known,
        answer=args.answer_tokens or min(420.0, 0.58 * limit),
        prompts=tokens,
        longest_prompt=args.longest_prompt,
    )
    return Plan(
        recipe,
        decoder,
        on,
        lengths,
        prompts=args.prompts or len(recipe.prompts or ()) or 20000,
        heldout=args.heldout or len(recipe.heldout or ()) or 1000,
        efficiency=efficiencies(args.efficiency, on),
    )


def show(lines: Iterator[str]) -> None:
    """Paragraphs and tables; the columns of a table are padded to read well on a screen."""
    table: list[list[str]] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if table:
            widths = [max(map(len, column)) for column in zip(*table)]
            for row in table:
                fill = "-" if set("".join(row)) == {"-"} else " "
                cells = [
                    cell.ljust(width, fill) if i == 0 else cell.rjust(width, fill)
                    for i, (cell, width) in enumerate(zip(row, widths))
                ]
                print("| " + " | ".join(cells) + " |")
            table = []
        print(line)


def assumptions(plan: Plan) -> Iterator[str]:
    d, on, lengths, recipe = plan.decoder, plan.on, plan.lengths, plan.recipe
    chip = on.chip
    yield (
        f"{recipe.name} on {on}: {on.size} chips, {on.hosts} hosts, each chip "
        f"{chip.memory / GIB:.1f} GiB, {chip.bf16 / 1e12:.3g} TFLOP/s bf16, "
        f"{chip.fp32 / 1e12:.3g} fp32, {chip.read / 1e9:.0f} GB/s memory"
        + (f", {on.exchange / 1e9:.0f} GB/s exchange" if on.size > 1 else "")
    )
    yield (
        f"model: {d.parameters:,} parameters; an iteration: {plan.prompts:,} prompts of "
        f"{lengths.prompt:.0f} tokens, {recipe.sample.n} answers of {lengths.answer:.0f} each; "
        f"{plan.heldout:,} held out"
    )
    told = ", ".join(f"{name} {value:.0%}" for name, value in plan.efficiency.items())
    where = "measured by scripts.bench, or as given" if on.is_cpu else "assumed, or as given"
    yield f"share of the roofline ({where}): {told}"


def memory_table(plan: Plan, memory: list[programs.Memory], how: str) -> Iterator[str]:
    yield f"GiB a chip, {how}, at the longest texts that are allowed:"
    yield "| program | " + " | ".join(fit.PARTS) + " | together | of | |"
    yield "|" + "-|" * (len(fit.PARTS) + 4)
    for m in memory:
        # What the arithmetic names apart is a part of the compiler's temporaries.
        parts = dict(m.parts)
        parts["activations"] = parts.get("activations", 0) + parts.pop("next gradients", 0)
        cells = [f"{parts[p] / GIB:.2f}" if p in parts else "" for p in fit.PARTS]
        verdict = "fits" if fit.fits(m, plan.on) else "does not fit"
        together = "refused" if m.refused else f"{m.total / GIB:.2f}"
        limit = f"{plan.on.chip.memory / GIB:.1f}"
        yield f"| {m.program} | " + " | ".join([*cells, together, limit, verdict]) + " |"


def time_table(plan: Plan, price: float | None) -> Iterator[str]:
    rounds, on = plan.recipe.iterations, plan.on
    yield (
        f"Time, {rounds} iterations; per cent of a stage's work: bound by products, by memory, "
        "or waiting for other chips; PFLOP and TB of one time, one chip:"
    )
    yield "| stage | times | chips | start s | work s | products | memory | exchange | PFLOP | TB |"
    yield "|-|-|-|-|-|-|-|-|-|-|"
    for stage in plan.stages():
        ideal = seconds(stage.pieces, on, stage.dtype)
        start = stage.imports + stage.start
        work = plan.seconds(stage) - start
        waited = max(0.0, ideal.total - ideal.compute - ideal.memory)
        shares = [
            f"{part / ideal.total:.0%}" if ideal.total else ""
            for part in (ideal.compute, ideal.memory, waited)
        ]
        sums = [
            f"{total(stage.pieces, what) / unit:.3g}" if stage.pieces else ""
            for what, unit in (("flops", 1e15), ("bytes", 1e12))
        ]
        yield (
            f"| {stage.name} | {stage.times} | {stage.chips} | {start:.0f} | {work:.0f} | "
            + " | ".join([*shares, *sums])
            + " |"
        )
    yield ""
    training = plan.training()
    whole = next(stage for stage in plan.stages() if stage.name == "dpo")
    a_step = seconds(training.step(), on, whole.dtype).total / plan.efficiency["dpo"]
    mfu = training.model_flops() / a_step / on.size / on.chip.flops(whole.dtype)
    yield (
        f"a step of {training.args.batch_size} pairs: {a_step:.3g} s, {mfu:.0%} of the peak in "
        f"useful products; {training.steps:,} steps an iteration"
    )
    for flag, other in plan.others():
        if other.hours() < 0.9 * plan.hours():
            yield f"with {flag} the whole run would take {other.hours():.3g} hours"
    hours = plan.hours()
    cost = f", {hours * on.size * price:,.0f} dollars at {price:g} each" if price else ""
    yield f"the whole run: {hours:.3g} hours, {hours * on.size:.3g} chip-hours{cost}"


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
