"""Whether the programs fit a chip's memory, and what would make them."""

import dataclasses
from collections.abc import Iterator

from scripts.plan.arithmetic import PAIRRM, PAIRRM_TOKENS
from scripts.plan.programs import Memory
from scripts.plan.schedule import Plan
from scripts.plan.slices import Slice
from sharding.chips import GIB

PARTS = ("parameters", "moments", "gradients", "cache", "activations")


def by_arithmetic(plan: Plan) -> list[Memory]:
    """One program a stage, at the longest texts that its limits allow."""
    sampling, training = plan.sampling(), plan.training()
    found = [Memory(f"sample: a step of {sampling.slots} slots", sampling.memory())]
    if plan.pairrm:
        found.append(Memory("rank: a layer", plan.ranking().memory()))
    pairs = plan.recipe.dpo.micro_batch_size
    return [*found, Memory(f"dpo: gradients of {pairs} pairs", training.memory())]


def compiler_work(plan: Plan) -> dict[str, dict]:
    """The arguments of programs.compiled for the same programs."""
    sampling, args = plan.sampling(), plan.recipe.dpo
    flags = ("n", "temperature", "top_p", "top_k", "min_p", "max_new_tokens")
    config = dataclasses.asdict(plan.decoder.config)
    work = {
        "sample": {
            "config": dict(config),
            "mesh": dataclasses.astuple(sampling.mesh),
            "slots": sampling.slots,
            "length": sampling.cache_length,
            "prefill": 512,
            "dtype": sampling.args.dtype,
            "flags": {name: getattr(sampling.args, name) for name in flags},
        },
        "dpo": {
            "config": dict(config),
            "mesh": dataclasses.astuple(plan.training().mesh),
            "pairs": args.micro_batch_size,
            "prompt": args.max_prompt_length,
            "length": args.max_length,
            "dtype": args.dtype,
            "remat": args.remat,
            "several": plan.training().micro_batches > 1,
            "recipe": {
                name: getattr(args, name)
                for name in (
                    "learning_rate",
                    "schedule",
                    "warmup_ratio",
                    "optimizer",
                    "weight_decay",
                    "max_grad_norm",
                )
            },
        },
    }
    if plan.pairrm:
        work["rank"] = {
            "config": dataclasses.asdict(PAIRRM),
            "dtype": plan.ranking().dtype,
            "rows": PAIRRM_TOKENS // 2048,
            "length": 2048,
        }
    return work


def fits(memory: Memory, on: Slice) -> bool:
    return not memory.refused and memory.total <= on.chip.memory


def remedy(plan: Plan, stage: str) -> str:
    """What would make this stage fit, by arithmetic: first what costs no chips."""
    while plan.on.size <= 4096:
        for changed, told in _changes(plan, stage):
            found = next(m for m in by_arithmetic(changed) if m.program.startswith(stage))
            if fits(found, changed.on):
                return f"by arithmetic {changed.on} fits with {told}"
        plan = dataclasses.replace(plan, on=larger(plan.on)).changed(stage, mesh=None)
    return "no more chips of this kind, up to 4096, would do"


def _changes(plan: Plan, stage: str) -> Iterator[tuple[Plan, str]]:
    """The plan with other flags of the stage, one more at a time, and these flags."""
    given = getattr(plan.recipe, stage)
    flags: list[dict] = [{}]
    if stage == "sample":
        slots = plan.sampling().slots
        while (slots := slots // 2) >= plan.sampling().mesh.batch:
            flags.append({"slots": slots})
        flags.append({**flags[-1], "dtype": "bfloat16"})
    if stage == "dpo":
        flags.append({"remat": "full"})
        pairs, shards = given.micro_batch_size, plan.training().mesh.batch
        while pairs > shards:
            pairs = max(shards, pairs // 2)
            flags.append({"remat": "full", "micro_batch_size": pairs})
        flags.append({**flags[-1], "optimizer": "rmsprop"})
    for changed in flags:
        new = {name: value for name, value in changed.items() if getattr(given, name) != value}
        told = [f"--{name.replace('_', '-')} {value}" for name, value in new.items()]
        yield plan.changed(stage, **new), " ".join(told) or "the recipe's flags"


def larger(on: Slice) -> Slice:
    """The same chip, twice as many: the shortest side doubled."""
    shape = list(on.shape)
    shape[shape.index(min(shape))] *= 2
    return Slice(on.chip, tuple(shape))


def refusal(memory: Memory, plan: Plan) -> str:
    """One line: why not, and the way out."""
    stage, on = memory.program.partition(":")[0], plan.on
    if memory.refused:
        why = memory.refused
    else:
        largest = sorted(memory.parts.items(), key=lambda part: -part[1])
        listed = ", ".join(f"{n} {size / GIB:.1f}" for n, size in largest if size > GIB / 10)
        why = f"takes {memory.total / GIB:.1f} GiB a chip ({listed})"
    if stage == "dpo":
        state = sum(plan.training().memory()[n] for n in ("parameters", "moments", "gradients"))
        why += f"; fp32 masters, moments and gradients alone are {state * on.size / 1e9:.0f} GB"
    return (
        f"{memory.program} {why}; a chip of {on} has {on.chip.memory / GIB:.1f}: "
        f"{remedy(plan, stage)}"
    )
