"""Training: ours against TRL's DPOTrainer, the same weights and real pairs, fp32."""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from scripts.bench.machine import Side, gemm_rate, peak_memory, two_formats
from stages.records import UserError


@dataclasses.dataclass
class Dpo:
    """DPO: ours against TRL's DPOTrainer, by default and with its reference's log-probs computed
    beforehand. Pairs of two models' answers to AlpacaEval, nothing rematerialised.

    Ours counts with its reference pass, one for each step, as in a single epoch.
    """

    checkpoint: str | None = None
    """A checkpoint folder; default: the demo's model, converted for the run."""
    steps: int = 2
    """Steps that are timed, after one to warm up."""
    pairs: int = 4
    """Pairs a step."""
    max_length: int = 512
    """Tokens of prompt and response; a longer response is cut."""


def bench(args: Dpo) -> None:
    data = Path(os.environ.get("ALIGN_TEST_DATA", "../shared/data")) / "alpaca_eval"
    if not data.is_dir():
        raise UserError(f"{data} does not exist: set ALIGN_TEST_DATA to the tests' data")
    with tempfile.TemporaryDirectory() as temporary:
        from model import checkpoint
        from model.tokenizer import ChatTokenizer

        folder, hf_folder = two_formats(args.checkpoint, temporary)
        config = checkpoint.load_config(folder)
        tokenizer = ChatTokenizer.from_folder(folder, config.eos_token_ids)
        rows = _rows(data, tokenizer, args)
        sides = {
            "ours": Side(_our_worker, folder, rows, args),
            "TRL": Side(_trl_worker, hf_folder, rows, args, False),
            "TRL, precomputed": Side(_trl_worker, hf_folder, rows, args, True),
        }
        rate, found = gemm_rate(), {}
        for name, side in sides.items():
            found[name] = side.ask("run")
            side.close()
            print(f"{name}: a step {', '.join(f'{x:.1f}' for x in found[name]['steps'])} s",
                  flush=True)  # fmt: skip
        rate = max(rate, gemm_rate())
    tokens = sum(_tokens(row) for row in rows[args.pairs :]) / args.steps
    shared = sum(len(row["prompt_ids"]) for row in rows[args.pairs :]) / args.steps
    print(f"fp32 GEMM {rate / 1e9:.0f} GFLOP/s; a step: {args.pairs} pairs, {tokens:.0f} tokens of "
          f"prompts twice and responses ({tokens - shared:.0f} with the prompt once)")  # fmt: skip
    took = {}
    for name, result in found.items():
        reference = result["reference"]
        took[name] = float(np.mean(result["steps"])) + reference
        print(f"{name:17s} {took[name]:6.1f} s a step, of which reference {reference:.1f}: "
              f"{args.pairs / took[name]:.3f} pairs/s, {tokens / took[name]:.0f} tokens/s, "
              f"peak {result['memory'] / 2**30:.2f} GiB")  # fmt: skip
    reached = found["ours"]["flops"] / took["ours"]
    print(f"ours: {reached / 1e9:.0f} GFLOP/s of products with weights, {reached / rate:.0%} of "
          f"GEMM; padding {found['ours']['padding']:.1%}")  # fmt: skip
    for name in list(found)[1:]:
        print(f"ratio to {name}: {took[name] / took['ours']:.2f}")
    print(f"the first step's mean log-probs apart by at most {_furthest(found):.1e}")


def _furthest(found: dict) -> float:
    ours = found["ours"]["logps"]
    return max(abs(a - b) for name in list(found)[1:] for a, b in zip(ours, found[name]["logps"]))


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


def _our_worker(pipe, folder: str, rows: list[dict], args: Dpo):
    import jax

    from model import checkpoint, losses, mistral, train
    from model.packing import Sequence, pack
    from sharding.mesh import make_mesh, replicated, tree_shardings

    pipe.recv()
    config = checkpoint.load_config(folder)
    mesh = make_mesh()
    shapes = mistral.abstract(config)
    shardings = tree_shardings(mesh, mistral.logical_axes(config), shapes)
    recipe = train.Recipe(losses.Loss(), 5e-7, "linear", 0.0, "adamw", 0.0, 1.0)
    layer_weights = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes["layers"]))
    vocabulary = config.vocab_size * config.hidden_size
    batches = []
    for at in range(0, len(rows), args.pairs):
        batches.append(pack([
            Sequence(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])
            for row in rows[at : at + args.pairs]
        ]))  # fmt: skip
    ones = np.ones(args.pairs, np.float32)
    with jax.set_mesh(mesh):
        trainer = train.Trainer(config, recipe, 10, shardings, replicated(mesh), remat="none")
        params = checkpoint.load(folder, shardings)[1]
        # Each shape is compiled before anything is timed.
        references = [
            jax.device_get(trainer.logprobs(params, batch=batch, pairs=args.pairs))
            for batch in batches
        ]
        seconds = []
        for batch in batches[1:]:
            begun = time.perf_counter()
            jax.block_until_ready(trainer.logprobs(params, batch=batch, pairs=args.pairs))
            seconds.append(time.perf_counter() - begun)
        state = trainer.init_optimizer(params)
        steps = []
        for turn in range(2):
            for batch, (chosen, rejected) in zip(batches, references):
                sides = {
                    "ref_chosen": chosen, "ref_rejected": rejected, "chosen_tokens": ones,
                    "rejected_tokens": ones, "win_probability": ones, "weights": ones,
                }  # fmt: skip
                begun = time.perf_counter()
                gradients, _ = trainer.accumulate(params, None, batch, sides, float(args.pairs))
                norm = trainer.norm(gradients)
                params, state, _ = trainer.apply(params, state, gradients, norm)
                del gradients
                jax.block_until_ready(params)
                if turn and batch is not batches[0]:
                    steps.append(time.perf_counter() - begun)
    tokens = np.mean([np.sum(b["copies"][..., 0] >= 0) for b in batches[1:]])
    responses = np.mean([np.sum(b["owners"] >= 0) for b in batches[1:]])
    pipe.send({
        "steps": steps, "reference": float(np.mean(seconds)), "memory": peak_memory(),
        # Forward once for the reference, and forward and backward for the step.
        "flops": 8.0 * (tokens * float(layer_weights) + responses * vocabulary),
        "padding": float(1 - tokens / np.mean([b["tokens"].size for b in batches[1:]])),
        "logps": [float(np.mean(x)) for x in references[0]],
    })  # fmt: skip
    pipe.recv()


def _trl_worker(pipe, folder: str, rows: list[dict], args: Dpo, precompute: bool):
    pipe.recv()
    with contextlib.redirect_stdout(sys.stderr):
        import datasets
        import torch
        import transformers
        from trl import DPOConfig

        from scripts.bench.trl_trainer import Plain

    steps = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.begun = time.perf_counter()

        def on_step_end(self, *_, **__):
            steps.append(time.perf_counter() - self.begun)

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        config = DPOConfig(
            output_dir=out, per_device_train_batch_size=args.pairs, max_steps=args.steps + 1,
            learning_rate=5e-7, optim="adamw_torch", report_to="none", beta=0.1,
            max_length=args.max_length, gradient_checkpointing=False, bf16=False, use_cpu=True,
            save_strategy="no", logging_steps=1, disable_tqdm=True,
            precompute_ref_log_probs=precompute, precompute_ref_batch_size=args.pairs,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        begun = time.perf_counter()
        trainer = Plain(
            model=model, args=config, processing_class=tokenizer, callbacks=[Clock()],
            train_dataset=datasets.Dataset.from_list(rows),
        )  # fmt: skip
        reference = (time.perf_counter() - begun) * args.pairs / len(rows) if precompute else 0.0
        trainer.train()
        first = next(x for x in trainer.state.log_history if "logps/chosen" in x)
        logps = [first["logps/chosen"], first["logps/rejected"]]
    pipe.send({"steps": steps[1:], "reference": reference, "memory": peak_memory(), "logps": logps})
    pipe.recv()
