"""Training: ours against TRL's DPOTrainer, the same weights and real pairs."""

import dataclasses
import tempfile
import threading
from functools import partial

import numpy as np
from etils import epy

from scripts.bench import machine

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax

    from model import batches, checkpoint, packing, train
    from scripts.bench import training_pieces
    from sharding import mesh as meshes


@dataclasses.dataclass
class Dpo(machine.BenchFlags):
    """DPO: ours against TRL's DPOTrainer, each in float32 and bfloat16 (TRL's default), and TRL's
    also with its reference's log-probs computed beforehand. Pairs of two models' answers to
    AlpacaEval, nothing rematerialised.

    Each counts with its reference pass, as in a single epoch. Ours and one of TRL's lie in memory
    at a time, and take turns, step by step.
    """

    checkpoint: str | None = None
    """A checkpoint folder; default: the demo's model, converted for the run."""
    steps: int = 2
    """Steps of the last of --precisions that are timed, after two to warm up; of the other one, one
    step is timed."""
    pairs: int = 4
    """Pairs a step."""
    max_length: int = 512
    """Tokens of prompt and response; a longer response is cut."""
    learning_rate: float = 5e-7
    trl_tuned: bool = False
    """Give TRL's process the malloc settings that scripts/iterate.sh gives ours; by default it runs
    as its users run it. TRL gains more by them than ours does: it asks for more memory."""


def bench(args: Dpo) -> None:
    sides = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, hf_folder = machine.two_formats(args.checkpoint, temporary)
        rows = read_rows(folder, args)
        prompts, *responses = (
            sum(len(row[f"{name}_ids"]) for row in rows) / args.steps
            for name in ("prompt", "chosen", "rejected")
        )
        print(
            f"a step: {args.pairs} pairs, {2 * prompts + sum(responses):.0f} tokens of prompts "
            f"twice and responses, {prompts + sum(responses):.0f} with the prompt once",
            flush=True,
        )
        for dtype in args.precisions:
            ours = machine.Side("ours", dtype, Ours, folder, rows, args)
            logps, padding = ours.ask("warm")
            steps = range(1, 1 + (args.steps if dtype == args.precisions[-1] else 1))
            sides.append(ours)
            for name, precompute in (("TRL", False), ("TRL, precomputed", True)):
                where = hf_folder, rows, args, precompute
                theirs = machine.Side(name, dtype, Theirs, *where, tuned=args.trl_tuned)
                sides.append(theirs)
                machine.warm_up([ours, theirs] if not precompute else [theirs])
                machine.in_turns("step", steps, [ours, theirs])
                apart = max(abs(a - b) for a, b in zip(logps, theirs.ask("logps")))
                said = f"the first step's mean log-probs are apart from ours by {apart:.1e}"
                machine.report(theirs, "pairs/s", said)
                theirs.close()
            machine.report(ours, "pairs/s", f"{padding:.1%} padding")
            ours.close()
    machine.compare(sides)


def read_rows(folder: str, args: Dpo) -> list[dict]:
    """TRL's columns, of all steps' pairs."""
    answers = machine.alpaca_eval("Snorkel-Mistral-PairRM-DPO", "Mistral-7B-Instruct-v0.2")
    tokenizer, rows = checkpoint.open_folder(folder)[1], []
    for both in machine.spread(answers, args.steps * args.pairs):
        prompt = tokenizer.prompt_ids([{"role": "user", "content": both[0]["instruction"]}])
        prompt = prompt[: args.max_length // 2]
        sides = [tokenizer.response_ids(x["output"]) + [tokenizer.end_id] for x in both]
        chosen, rejected = (ids[: args.max_length - len(prompt)] for ids in sides)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


# ------------------------------------------------------------------------------ the sides


class Ours(machine.Worker):
    def __init__(self, dtype: machine.Dtype, folder: str, rows: list[dict], args: Dpo):
        super().__init__(dtype)
        config, mesh = checkpoint.load_config(folder), meshes.make_mesh()
        self.training = training_pieces.Training(
            config,
            args.pairs,
            dtype,
            mesh,
            lambda on: checkpoint.load(folder, on)[1],
            args.learning_rate,
            len(rows) // args.pairs,
        )
        sequences = [
            packing.Sequence(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])
            for row in rows
        ]
        starts = range(0, len(rows), args.pairs)
        self.batches = [packing.pack(sequences[at : at + args.pairs]) for at in starts]

    def warm(self) -> tuple[list[float], float]:
        """Compile each batch's shape. The mean log-probs of the first batch, and the share of
        padding."""
        logps, *_ = [self._step(batch) for batch in self.batches]
        micro = [batches.MicroBatch([], batch, {}) for batch in self.batches]
        speed = partial(train.speed, self.training.trainer.params, seconds=1)
        # Forward and backward for the step, and forward for the reference: a third more. Products
        # with weights alone.
        self.useful = [4 / 3 * speed([batch])["model_flops_per_second"] for batch in micro]
        return [float(np.mean(x)) for x in logps], speed(micro)["padding"]

    def work(self, turn: int) -> tuple[float, int, float]:
        step = max(turn, 1) - 1  # the first one also warms up
        seconds, _ = machine.timed(self._step, self.batches[step])
        return seconds, self.training.pairs, self.useful[step]

    def _step(self, batch: dict):
        """The reference's log-probs; the update is computed too."""
        training = self.training
        with jax.set_mesh(training.mesh):
            logps = training.logprobs(training.params, batch)
            gradients, _ = training.gradients(training.with_reference(batch, logps))
            training.update(gradients)
        return jax.device_get(logps)


class Theirs(machine.Worker):
    """TRL's own loop, in a thread that each turn lets go on by a step."""

    library = "PyTorch"

    def __init__(
        self, dtype: machine.Dtype, folder: str, rows: list[dict], args: Dpo, precompute: bool
    ):
        from scripts.bench import trl_trainer  # here: heavy, and for this side alone

        super().__init__(dtype)
        self.steps = trl_trainer.StepByStep()
        rows = 2 * rows[: args.pairs] + rows  # the first step twice more, to warm up
        self.trainer = trl_trainer.make(
            folder,
            rows,
            args.pairs,
            dtype,
            [self.steps],
            learning_rate=args.learning_rate,
            precompute_ref_log_probs=precompute,
            precompute_ref_batch_size=args.pairs,
        )
        self.pairs = args.pairs
        # Per step; the two that warm up come first.
        self.reference = float(np.mean(self.trainer.reference_seconds[2:])) if precompute else 0.0
        threading.Thread(target=self.trainer.train, daemon=True).start()

    def work(self, _: int) -> tuple[float, int, None]:
        return self.steps.step() + self.reference, self.pairs, None

    def logps(self) -> list[float]:
        """The mean log-probs of the first step."""
        first = next(x for x in self.trainer.state.log_history if "logps/chosen" in x)
        return [first["logps/chosen"], first["logps/rejected"]]
