"""Training: ours against TRL's DPOTrainer, the same weights and real pairs, fp32."""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from etils import epy

from scripts.bench.machine import Side, peak_memory, timed, two_formats
from scripts.plan.slices import gemm_rate
from sharding.errors import UserError

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax

    from model import checkpoint, decoder, losses, packing, train
    from model import tokenizer as tokenizers
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
    data = Path(os.environ.get("ALIGN_TEST_DATA", "../shared/data")) / "alpaca_eval"
    if not data.is_dir():
        raise UserError(f"{data} does not exist: set ALIGN_TEST_DATA to the tests' data")
    with tempfile.TemporaryDirectory() as temporary:
        folder, hf_folder = two_formats(args.checkpoint, temporary)
        config = checkpoint.load_config(folder)
        tokenizer = tokenizers.ChatTokenizer.from_folder(folder, config.eos_token_ids)
        rows = _rows(data, tokenizer, args)
        ours = Side(our_worker, folder, rows, args)
        facts = ours.ask("begin")
        tokens = sum(map(_tokens, rows[args.pairs :])) / args.steps
        shared = sum(len(row["prompt_ids"]) for row in rows[args.pairs :]) / args.steps
        print(
            f"a step: {args.pairs} pairs, {tokens:.0f} tokens of prompts twice and responses, "
            f"{tokens - shared:.0f} with the prompt once; of ours {facts['padding']:.1%} are "
            "padding",
            flush=True,
        )
        shares = []
        for name, precompute in (("TRL", False), ("TRL, precomputed", True)):
            # Both sides in memory at a time, a step of each in turn.
            theirs = Side(_trl_worker, hf_folder, rows, args, precompute, tuned=args.trl_tuned)
            reference = theirs.ask("begin")
            taken = {"ours": [], name: []}
            for number in range(args.steps + 1):
                seconds, gemm = ours.ask("step", number)
                turn = {"ours": seconds, name: theirs.ask("step") + reference}
                if number == 0:  # to warm up
                    continue
                for side, took in turn.items():
                    taken[side].append(took)
                shares.append(facts["flops"][number] / seconds / gemm)
                told = ", ".join(f"{side} {took:.1f} s" for side, took in turn.items())
                print(f"step {number}: {told} (GEMM {gemm / 1e9:.0f} GFLOP/s)", flush=True)
            logps, memory = theirs.ask("facts")
            theirs.close()
            for side, peak in (("ours", ours.ask("memory")), (name, memory)):
                mean = float(np.mean(taken[side]))
                print(
                    f"{side:17s} {mean:6.1f} s a step: {args.pairs / mean:.3f} pairs/s, "
                    f"{tokens / mean:.0f} tokens/s, peak {peak / 2**30:.2f} GiB"
                )
            apart = max(abs(a - b) for a, b in zip(facts["logps"], logps))
            ratio = np.sum(taken[name]) / np.sum(taken["ours"])
            print(
                f"ratio to {name}: {ratio:.2f}; the first step's mean log-probs are apart by "
                f"{apart:.1e}",
                flush=True,
            )
        ours.close()
    print(
        f"ours: useful products with weights at {np.mean(shares):.0%} of the GEMM rate measured "
        "before each step"
    )


def _tokens(row: dict) -> int:
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def _rows(data: Path, tokenizer, args: Dpo) -> list[dict]:
    """TRL's columns: the first step's pairs, to warm up, and all steps' pairs."""
    names = ("Snorkel-Mistral-PairRM-DPO", "Mistral-7B-Instruct-v0.2")
    models = [json.loads((data / f"{name}.json").read_text()) for name in names]
    count, rows = args.steps * args.pairs, []
    step = len(models[0]) // count
    for one, other in list(zip(*models))[::step][:count]:
        prompt = tokenizer.prompt_ids([{"role": "user", "content": one["instruction"]}])
        prompt = prompt[: args.max_length // 2]
        sides = [tokenizer.response_ids(x["output"]) + [tokenizer.eos_ids[0]] for x in (one, other)]
        chosen, rejected = (ids[: args.max_length - len(prompt)] for ids in sides)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows[: args.pairs] + rows


# ------------------------------------------------------------------------------ the sides


def our_worker(pipe, folder: str, rows: list[dict], args: Dpo):
    pipe.recv()
    config = checkpoint.load_config(folder)
    mesh = meshes.make_mesh()
    shapes = decoder.abstract(config, mesh)
    optimization = train.Optimization(5e-7, "linear", 0.0, "adamw", 0.0, 1.0)
    loss = partial(losses.pair_loss, loss=losses.Loss(), config=config, dtype=np.float32)
    pair_logprobs = jax.jit(
        partial(losses.pair_logprobs, config=config, pairs=args.pairs, dtype=np.float32),
        out_shardings=meshes.replicated(mesh),
    )
    batches = [
        packing.pack(
            [
                packing.Sequence(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])
                for row in rows[at : at + args.pairs]
            ]
        )
        for at in range(0, len(rows), args.pairs)
    ]
    tokens = np.array([np.sum(batch["copies"][..., 0] >= 0) for batch in batches])
    responses = np.array([np.sum(batch["owners"] >= 0) for batch in batches])
    layers = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes["layers"]))
    vocabulary = config.vocab_size * config.hidden_size
    ones = np.ones(args.pairs, np.float32)

    def reference(batch, params):
        """The log-probs of both sides."""
        return jax.device_get(pair_logprobs(params, batch))

    def step(batch, params, state):
        """(the reference's log-probs, the new parameters and optimizer state), all computed."""
        logps = reference(batch, params)
        sides = {
            "ref_chosen": logps[0],
            "ref_rejected": logps[1],
            "chosen_tokens": ones,
            "rejected_tokens": ones,
            "win_probability": ones,
            "weights": ones,
        }
        gradients, _ = trainer.accumulate(params, None, batch | sides, float(args.pairs))
        norm = trainer.norm(gradients)
        params, state, _ = trainer.apply(params, state, gradients, norm)
        return logps, *jax.block_until_ready((params, state))

    with jax.set_mesh(mesh):
        trainer = train.Trainer(loss, optimization, 100, shapes)
        params = checkpoint.load(folder, mesh)[1]
        state = trainer.init_optimizer(params)
        for batch in batches:  # each shape is compiled before anything is timed
            found, params, state = step(batch, params, state)
            if batch is batches[0]:
                logps = [float(np.mean(x)) for x in found]
        pipe.send(
            {
                # Forward for the reference, and forward and backward for the step.
                "flops": 8.0 * (tokens * float(layers) + responses * vocabulary),
                "logps": logps,
                "padding": 1 - tokens[1:].sum() / sum(b["tokens"].size for b in batches[1:]),
            }
        )
        while True:
            what, number = pipe.recv()
            if what == "memory":
                pipe.send(peak_memory())
                continue
            if what == "reference":
                pipe.send(timed(partial(reference, batches[number], params))[0])
                continue
            gemm = gemm_rate()
            seconds, (_, params, state) = timed(partial(step, batches[number], params, state))
            pipe.send((seconds, gemm))


def _trl_worker(pipe, folder: str, rows: list[dict], args: Dpo, precompute: bool):
    pipe.recv()
    with contextlib.redirect_stdout(sys.stderr):
        import datasets  # here: torch is heavy, and what it prints at import goes to stderr
        import torch
        import transformers
        from trl import DPOConfig

        from scripts.bench.trl_trainer import Plain

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            pipe.recv()
            self.begun = time.perf_counter()

        def on_step_end(self, *_, **__):
            pipe.send(time.perf_counter() - self.begun)

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        config = DPOConfig(
            output_dir=out,
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
        seconds, trainer = timed(
            lambda: Plain(
                model=model,
                args=config,
                processing_class=tokenizer,
                callbacks=[Clock()],
                train_dataset=datasets.Dataset.from_list(rows),
            )
        )
        pipe.send(seconds * args.pairs / len(rows) if precompute else 0.0)
        trainer.train()
        first = next(x for x in trainer.state.log_history if "logps/chosen" in x)
    pipe.recv()
    pipe.send(([first["logps/chosen"], first["logps/rejected"]], peak_memory()))
    pipe.recv()
