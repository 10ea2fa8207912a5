"""What bfloat16 changes, set beside float32: answers, log-probs and DPO steps."""

import dataclasses
import random
import tempfile
from typing import Literal, get_args

import numpy as np
from etils import epy

from scripts.bench import dpo, machine, sample

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax

    from model import checkpoint, generate, logprobs, losses, packing, precision

Part = Literal["greedy", "sampled", "logprobs", "dpo"]
Drawn = list[tuple[list[int], "list[generate.Answer]"]]  # prompts' token ids, and their answers
METRICS = "loss rewards/chosen rewards/rejected logps/chosen logps/rejected".split()


@dataclasses.dataclass
class Bf16:
    """What bfloat16 changes.

    greedy: how many greedy answers are float32's, and where the others part. sampled: the same of
    five sampled answers per prompt; and how many change in bfloat16 with other slots and the
    prompts shuffled. logprobs: how far the sampler's log-probs are from the trainer's. dpo: how far
    the steps are from float32's, ours and TRL's.
    """

    only: tuple[Part, ...] = get_args(Part)
    """What to measure."""
    checkpoint: str | None = None
    """A checkpoint folder; default: the demo's model, converted for the run."""
    prompts: str | None = None
    """A prompts.jsonl; default: AlpacaEval's instructions, where the tests' data lies."""
    greedy: int = 50
    """Prompts to answer greedily."""
    sampled: int = 80
    """Prompts to sample answers to."""
    max_new_tokens: int = 128
    slots: tuple[int, int] = (80, 32)
    """Answers in the making at a time; in the second run of bfloat16."""
    steps: int = 20
    """Steps of DPO, four pairs each."""
    max_length: int = 128
    """Tokens of prompt and response in DPO."""
    learning_rate: float = 5e-5
    """Of DPO; default: the demo's."""


def bench(args: Bf16) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, hf_folder = machine.two_formats(args.checkpoint, temporary)
        if "greedy" in args.only:
            runs = [draw(args, folder, d, args.greedy, n=1, temperature=0) for d in machine.BOTH]
            print(f"greedy answers, float32 and bfloat16: {agreement(*runs)}", flush=True)
        if "sampled" in args.only:
            runs = [draw(args, folder, dtype, args.sampled) for dtype in machine.BOTH]
            print(f"sampled answers, float32 and bfloat16: {agreement(*runs)}", flush=True)
            other = draw(args, folder, "bfloat16", args.sampled, slots=args.slots[1])
            slots = "{} slots and {}, prompts shuffled".format(*args.slots)
            print(f"sampled in bfloat16, {slots}: {agreement(runs[1], other)}", flush=True)
        for dtype in machine.BOTH if "logprobs" in args.only else ():
            apart = disagreement(folder, draw(args, folder, dtype, args.sampled // 5), dtype)
            told = f"apart by {apart.mean():.1e}, at most {apart.max():.1e}"
            print(f"log-probs per token, sampler and trainer in {dtype}: {told}", flush=True)
        if "dpo" in args.only:
            how = {"max_length": args.max_length, "learning_rate": args.learning_rate}
            compare_steps(dpo.Dpo(steps=args.steps, **how), folder, hf_folder)


# ------------------------------------------------------------------------------- answers


def draw(args: Bf16, folder: str, dtype: machine.Dtype, count: int, **how) -> Drawn:
    """The answers to so many prompts, shuffled where others than the first slots make them."""
    how = {"max_new_tokens": args.max_new_tokens, "slots": args.slots[0]} | how
    flags = sample.Sample(prompts=args.prompts, count=count, **how)
    side = sample.Ours(dtype, folder, flags, sample.read_prompts(flags))
    prompts = dict(side.prompts)
    order = sorted(prompts, key=int)
    if how["slots"] != args.slots[0]:
        random.Random(0).shuffle(order)
    answers = dict(side.answers([(i, prompts[i]) for i in order]))
    return [(ids, answers[i]) for i, ids in prompts.items()]


def drawn_ids(answer: "generate.Answer") -> list[int]:
    return answer.token_ids + [answer.end_token_id] * (answer.finish_reason == "stop")


def agreement(*runs: Drawn) -> str:
    """How many answers have the same tokens, and where the others part."""
    a, b = ([drawn_ids(answer) for _, answers in run for answer in answers] for run in runs)
    parted = [
        1 + [*(i == j for i, j in zip(x, y)), False].index(False) for x, y in zip(a, b) if x != y
    ]
    told = f"{len(a) - len(parted)} of {len(a)} equal ({1 - len(parted) / len(a):.1%})"
    return told + (f", the others part at token {np.median(parted):.0f} (median)" if parted else "")


def disagreement(folder: str, drawn: Drawn, dtype: machine.Dtype) -> np.ndarray:
    """|sampler − trainer| per token of each answer."""
    config, params = checkpoint.load(folder)
    how = {"responses": len(drawn[0][1]), "precision": precision.precision_of(dtype)}
    program = jax.jit(lambda p, batch: logprobs.response_logprobs(p, config, batch, **how))
    apart = []
    for prompt, answers in drawn:
        ids = [drawn_ids(answer) for answer in answers]
        sums = np.asarray(program(params, packing.pack([packing.Sequence(prompt, ids)])))
        apart += [np.abs(sums - [a.logprob for a in answers]) / [*map(len, ids)]]
    return np.concatenate(apart)


# ----------------------------------------------------------------------------------- dpo


def compare_steps(args: dpo.Dpo, folder: str, hf_folder: str) -> None:
    """Print the largest differences between the metrics of the steps in two precisions."""
    rows = dpo.read_rows(folder, args)
    ours, ours_half = (our_steps(dtype, folder, rows, args) for dtype in machine.BOTH)
    trl, trl_half = (trl_steps(dtype, hf_folder, rows, args) for dtype in machine.BOTH)
    print(f"{args.steps} DPO steps, apart at most by:")
    print(f"{'':20s}{'ours in bfloat16':>18s}{'TRL in bfloat16':>18s}{'ours in float32':>18s}")
    print(f"{'':20s}{'and in float32':>18s}{'and in float32':>18s}{'and TRL in it':>18s}")
    pairs = (ours_half, ours), (trl_half, trl), (ours, trl)
    for name, *apart in zip(METRICS, *(np.abs(a - b).max(axis=0) for a, b in pairs)):
        print(f"{name:20s}{''.join(f'{x:18.1e}' for x in apart)}", flush=True)


def our_steps(dtype: machine.Dtype, folder: str, rows: list[dict], args: dpo.Dpo) -> np.ndarray:
    """METRICS of each step."""
    side, steps = dpo.Ours(dtype, folder, rows, args), []
    training = side.training
    with jax.set_mesh(training.mesh):
        reference = [training.logprobs(training.params, batch) for batch in side.batches]
        for batch, logps in zip(side.batches, reference):
            gradients, values = training.gradients(training.with_reference(batch, logps))
            training.update(gradients)
            steps.append(losses.metrics(jax.device_get(values)))
    return np.array([[step[name] for name in METRICS] for step in steps])


def trl_steps(dtype: machine.Dtype, folder: str, rows: list[dict], args: dpo.Dpo) -> np.ndarray:
    """METRICS of each step."""
    from scripts.bench import trl_trainer  # here: heavy, and for this part alone

    trainer = trl_trainer.make(folder, rows, args.pairs, dtype, learning_rate=args.learning_rate)
    trainer.train()
    return np.array([[step[name] for name in METRICS] for step in trainer.metrics()])
