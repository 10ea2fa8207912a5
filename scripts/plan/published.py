"""The published run, and where training stops getting faster with more chips."""

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

from scripts.plan.arithmetic import DecoderCost, Mesh, TrainingCost, seconds
from scripts.plan.fit import fits
from scripts.plan.programs import Memory
from scripts.plan.schedule import Plan
from scripts.plan.slices import TORUS, Slice
from sharding.chips import CHIPS

# hf.co/snorkelai/Snorkel-Mistral-PairRM-DPO, all_results.json: three epochs over 19,958 pairs. The
# number of GPUs is not published: the Zephyr recipe's 8 are inferred. That recipe trains in bf16
# with gradient checkpointing, 8 pairs a GPU, the reference computed in every step.
PAIRS, EPOCHS, SECONDS, GPUS = 19958, 3, 18849.0, 8
# Means of 1,000 UltraFeedback prompts, cut to 512 tokens, with Mistral-7B-Instruct-v0.2's answers
# to AlpacaEval, cut to 1,024 together; and how much padding eight pairs of them bring, each row as
# long as the longest.
PROMPT, ANSWER, PADDED = 164, 378, 1.82


def published(decoder: DecoderCost) -> Iterator[str]:
    """What its time implies on GPUs of either kind."""
    tokens = 2 * (PROMPT + ANSWER)
    weights = decoder.layer_weights + decoder.vocabulary
    a_pair = 8 * weights * tokens  # 6 for the policy, 2 for the reference
    work = a_pair * PAIRS * EPOCHS
    # Checkpointing computes the policy's forward pass again: 10 instead of 8.
    hardware = work * 10 / 8 * PADDED
    yield (
        f"The published run's training: {PAIRS * EPOCHS:,} pairs of {tokens:,} tokens in "
        f"{SECONDS:,.0f} s, {work:.2e} FLOPs of products with weights; with padding and "
        f"checkpointing {hardware:.2e}."
    )
    yield "| on | FLOP/s a GPU | MFU | with padding and checkpointing |"
    yield "|-|-|-|-|"
    for name in ("a100-80", "h100"):
        rate, peak = work / SECONDS / GPUS, CHIPS[name].bf16
        yield (
            f"| {GPUS} {name} (their number is inferred) | {rate / 1e12:.0f}e12 | "
            f"{rate / peak:.1%} | {hardware / work * rate / peak:.1%} |"
        )


# ------------------------------------------------------------------------------- scaling

POD_SHAPES = {
    2: {16: (4, 4), 64: (8, 8), 256: (16, 16)},
    3: {16: (2, 2, 4), 64: (4, 4, 4), 256: (4, 8, 8)},
}


def slices(on: Slice) -> list[Slice]:
    """One host, and pods of 16, 64 and 256 chips."""
    name, dimensions = on.chip.name, TORUS.get(on.chip.name, 1)
    host = {"v5p": (2, 2, 1), "v4": (2, 2, 1), "v5e": (2, 4), "v6e": (2, 4)}.get(name, (8,))
    pods = POD_SHAPES.get(dimensions, {n: (n,) for n in (16, 64, 256)})
    return [Slice(on.chip, host), *(Slice(on.chip, pods[n]) for n in (16, 64, 256))]


def scaled(plan: Plan, on: Slice, tensor: int) -> TrainingCost | None:
    """The training on this slice with the largest micro-batch that fits, by arithmetic."""
    mesh = Mesh(1, on.size // tensor, tensor)
    pairs = plan.recipe.dpo.batch_size
    while pairs:
        args = dataclasses.replace(plan.recipe.dpo, micro_batch_size=pairs)
        training = dataclasses.replace(plan.training(), args=args, mesh=mesh)
        if fits(Memory("dpo", training.memory()), on):
            return training
        pairs //= 2
    return None


def scaling(plan: Plan) -> Iterator[str]:
    """A table of an optimizer step, and in words where it stops scaling."""
    batch, efficiency = plan.recipe.dpo.batch_size, plan.efficiency["dpo"]
    name = plan.on.chip.name
    yield f"A training step of {batch} pairs on {name}, seconds, at {efficiency:.0%} of each rate:"
    columns = "chips mesh micro-batch products memory exchange step MFU".split()
    yield "| " + " | ".join([*columns, "bound by"]) + " |"
    yield "|-|-|-|-|-|-|-|-|-|"
    best: list[tuple[int, float]] = []
    for on in slices(plan.on):
        tensors = [1] if on.size <= batch else [1, on.size // batch]
        rows = []
        for tensor in tensors:
            training = scaled(plan, on, tensor)
            if training is None:
                yield f"| {on} | 1×{on.size // tensor}×{tensor} | does not fit | | | | | | |"
                continue
            ideal = seconds(training.step(), on, training.args.dtype)
            compute, memory = ideal.compute / efficiency, ideal.memory / efficiency
            took = ideal.total / efficiency
            mfu = training.model_flops() / took / on.size / on.chip.bf16
            bound = max(
                (compute, "products"), (memory, "memory"), (ideal.exchange / efficiency, "exchange")
            )[1]
            rows.append(took)
            yield (
                f"| {on} | 1×{training.mesh.fsdp}×{tensor} | {training.args.micro_batch_size} | "
                f"{compute:.2f} | {memory:.2f} | {ideal.exchange / efficiency:.2f} | "
                f"{took:.2f} | {mfu:.0%} | {bound} |"
            )
        if rows:
            best.append((on.size, min(rows)))
    yield ""
    for (few, slow), (many, fast) in pairwise(best):
        gained = slow / fast
        share = gained / (many / few)
        yield f"{few} → {many} chips: {gained:.1f} times as fast, {share:.0%} of linear"
    yield (
        f"Beyond {batch} chips there is less than a pair a chip: along fsdp the chips that are too "
        "many compute rows of padding, and only tensor splits a pair. Exchange does not shrink "
        "with chips, since each gathers nearly all weights and gives nearly all gradients at every "
        "micro-batch: a larger batch hides it, more chips do not."
    )
