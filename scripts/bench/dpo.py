"""Training: ours against TRL's DPOTrainer, the same weights and real pairs, fp32."""

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
class Dpo:
    """DPO: ours against TRL's DPOTrainer, by default and with its reference's log-probs computed
    beforehand. Pairs of two models' answers to AlpacaEval, nothing rematerialised.

    Each counts with its reference pass, as in a single epoch. The sides take turns, step by step.
    """

    checkpoint: str | None = None
    """A checkpoint folder; default: the demo's model, converted for the run."""
    steps: int = 2
    """Steps that are timed, after one to warm up."""
    pairs: int = 4
    """Pairs a step."""
    max_length: int = 512
    """Tokens of prompt and response; a longer response is cut."""
    trl_tuned: bool = False
    """Give TRL's process the malloc settings that scripts/iterate.sh gives ours; by default it runs
    as its users run it. TRL gains more by them than ours does: it asks for more memory."""


def bench(args: Dpo) -> None:
    answers = machine.alpaca_eval("Snorkel-Mistral-PairRM-DPO", "Mistral-7B-Instruct-v0.2")
    with tempfile.TemporaryDirectory() as temporary:
        folder, hf_folder = machine.two_formats(args.checkpoint, temporary)
        rows = _rows(answers, folder, args)
        ours = machine.Side(Ours, folder, rows, args)
        facts = ours.ask("warm")
        prompts, responses = (
            sum(len(row[name]) for row in rows[args.pairs :] for name in names) / args.steps
            for names in (["prompt_ids"], ["chosen_ids", "rejected_ids"])
        )
        tokens = 2 * prompts + responses
        print(
            f"a step: {args.pairs} pairs, {tokens:.0f} tokens of prompts twice and responses, "
            f"{tokens - prompts:.0f} with the prompt once; of ours {facts['padding']:.1%} are "
            "padding",
            flush=True,
        )
        shares = []
        for name, precompute in (("TRL", False), ("TRL, precomputed", True)):
            # Both sides in memory at a time, a step of each in turn.
            theirs = machine.Side(Theirs, hf_folder, rows, args, precompute, tuned=args.trl_tuned)
            sides = {
                "ours": partial(ours.ask, "step"),
                name: lambda _, theirs=theirs: theirs.ask("step"),
            }
            for warm in sides.values():
                warm(0)
            steps = range(1, args.steps + 1)
            results, rates = machine.in_turns("step", steps, sides, gemm=partial(ours.ask, "gemm"))
            flops, seconds = facts["flops"][1:], {}
            shares += [f / took / rate for f, (took,), rate in zip(flops, results["ours"], rates)]
            for side_name, side in (("ours", ours), (name, theirs)):
                mean = seconds[side_name] = float(np.mean(results[side_name]))
                machine.report(
                    side_name,
                    side,
                    f"{mean:6.1f} s a step: {args.pairs / mean:.3f} pairs/s",
                    f"{tokens / mean:.0f} tokens/s",
                )
            apart = max(abs(a - b) for a, b in zip(facts["logps"], theirs.ask("logps")))
            theirs.close()
            print(
                f"ratio to {name}: {seconds[name] / seconds['ours']:.2f}; the first step's mean "
                f"log-probs are apart by {apart:.1e}",
                flush=True,
            )
        ours.close()
    print(
        f"ours: useful products with weights at {np.mean(shares):.0%} of the GEMM rate measured "
        "before each step"
    )


def _rows(answers: list[tuple[dict, ...]], folder: str, args: Dpo) -> list[dict]:
    """TRL's columns: the first step's pairs, to warm up, and all steps' pairs."""
    tokenizer, rows = checkpoint.open_folder(folder)[1], []
    for both in machine.spread(answers, args.steps * args.pairs):
        prompt = tokenizer.prompt_ids([{"role": "user", "content": both[0]["instruction"]}])
        prompt = prompt[: args.max_length // 2]
        sides = [tokenizer.response_ids(x["output"]) + [tokenizer.end_id] for x in both]
        chosen, rejected = (ids[: args.max_length - len(prompt)] for ids in sides)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows[: args.pairs] + rows


# ------------------------------------------------------------------------------ the sides


class Ours(machine.Worker):
    def __init__(self, folder: str, rows: list[dict], args: Dpo):
        config, mesh = checkpoint.load_config(folder), meshes.make_mesh()
        self.training = training_pieces.Training(
            config, args.pairs, np.float32, mesh, lambda on: checkpoint.load(folder, on)[1]
        )
        sequences = [
            packing.Sequence(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])
            for row in rows
        ]
        self.batches = [
            packing.pack(sequences[at : at + args.pairs]) for at in range(0, len(rows), args.pairs)
        ]

    def warm(self) -> dict:
        """Compile each batch's shape. What the steps compute: operations and padding; the mean
        log-probs of the first batch."""
        logps, *_ = [self._step(batch) for batch in self.batches]
        micro = [batches.MicroBatch([], batch, {}) for batch in self.batches]
        speed = partial(train.speed, self.training.trainer.params, seconds=1)
        # Forward and backward for the step, and forward for the reference: a third more.
        flops = [4 / 3 * speed([batch])["model_flops_per_second"] for batch in micro]
        return {
            "flops": np.array(flops),
            "logps": [float(np.mean(x)) for x in logps],
            "padding": speed(micro[1:])["padding"],
        }

    def step(self, number: int) -> tuple[float]:
        return machine.timed(self._step, self.batches[number])[:1]

    def _step(self, batch: dict):
        """The reference's log-probs; the update is computed too."""
        training = self.training
        with jax.set_mesh(training.mesh):
            logps = training.logprobs(training.params, batch)
            gradients, _ = training.gradients(training.with_reference(batch, logps))
            training.update(gradients)
        return jax.device_get(logps)


class Theirs(machine.Worker):
    """TRL's own loop, in a thread that each `step` lets go on."""

    def __init__(self, folder: str, rows: list[dict], args: Dpo, precompute: bool):
        import datasets  # here: heavy, and for this side alone
        import torch
        import transformers
        from trl import DPOConfig

        from scripts.bench.trl_trainer import Plain, StepByStep

        self.steps = StepByStep()
        config = DPOConfig(
            output_dir=f"{folder}-trl",
            per_device_train_batch_size=args.pairs,
            max_steps=args.steps + 1,
            learning_rate=5e-7,
            optim="adamw_torch",
            report_to="none",
            beta=0.1,
            max_length=args.max_length,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            precompute_ref_log_probs=precompute,
            precompute_ref_batch_size=args.pairs,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        seconds, self.trainer = machine.timed(
            lambda: Plain(
                model=model,
                args=config,
                processing_class=tokenizer,
                callbacks=[self.steps],
                train_dataset=datasets.Dataset.from_list(rows),
            )
        )
        self.reference = seconds * args.pairs / len(rows) if precompute else 0.0
        threading.Thread(target=self.trainer.train, daemon=True).start()

    def step(self) -> tuple[float]:
        return (self.steps.step() + self.reference,)

    def logps(self) -> list[float]:
        """The mean log-probs of the first step."""
        first = next(x for x in self.trainer.state.log_history if "logps/chosen" in x)
        return [first["logps/chosen"], first["logps/rejected"]]
