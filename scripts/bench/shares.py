"""What share of the plan's roofline the demo's stages reach on this machine."""

import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

from etils import epy

from scripts.bench import dpo, sample
from scripts.bench.machine import Side, two_formats
from scripts.plan.arithmetic import DecoderCost, Lengths, seconds
from scripts.plan.recipe import RECIPES, read
from scripts.plan.schedule import Plan
from scripts.plan.slices import gemm_rate, parse, read_rate
from sharding.errors import UserError
from stages.files.rows import Prompt
from stages.files.rows import read as read_rows

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    from model import checkpoint
    from model import tokenizer as tokenizers


@dataclasses.dataclass
class Shares:
    """The shares of the roofline that `scripts.plan demo --efficiency` divides by.

    The demo's model answers its first prompts and trains on pairs of such lengths, each once to
    compile and then timed in turns, the rates of products and memory measured before each turn.
    """

    out: str = "shares.json"
    """Where the shares go, for --efficiency."""
    rounds: int = 3
    """Turns; their median counts."""


def bench(args: Shares) -> None:
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds}: it must be at least 1")
    if not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: its folder does not exist: make it first")
    recipe = read("demo")
    drawn, pairs = recipe.sample, recipe.dpo.micro_batch_size
    rows = read_rows(str(RECIPES / "demo" / "train_1.jsonl"), Prompt)
    texts = [row.prompt for row in rows][: len(recipe.prompts)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = two_formats(None, temporary)[0]
        config = checkpoint.load_config(folder)
        tokenizer = tokenizers.ChatTokenizer.from_folder(folder, config.eos_token_ids)
        prompts = [tokenizer.prompt_ids([{"role": "user", "content": text}]) for text in texts]
        sampler = Side(
            sample.our_worker,
            folder,
            sample.Sample(
                n=drawn.n,
                max_new_tokens=drawn.max_new_tokens,
                slots=drawn.slots,
                temperature=drawn.temperature,
                top_p=drawn.top_p,
            ),
        )
        first, tokens, _ = sampler.ask("sample", texts)
        lengths = Lengths(
            prompt=statistics.mean(map(len, prompts)),
            prompts=tuple(map(len, prompts)),
            answer=tokens / len(texts) / drawn.n,
        )
        print(
            f"{len(texts) * drawn.n} answers of {lengths.answer:.0f} tokens; the first time "
            f"{first:.1f} s, compiling included",
            flush=True,
        )
        plan = Plan(
            recipe, DecoderCost(config), parse("cpu", (1.0, 1.0)), lengths, len(texts), 1, {}
        )
        training = plan.training()
        batches = training.batches()[: args.rounds]
        rows = [
            {"prompt_ids": s.prompt, "chosen_ids": s.responses[0], "rejected_ids": s.responses[1]}
            for batch in batches
            for s in batch
        ]
        trainer = Side(dpo.our_worker, folder, rows, dpo.Dpo(pairs=pairs))
        trainer.ask("begin")
        work = {
            "sample": plan.sampling().pieces(),
            "kl": training.reference(pairs),
            "dpo": training.step() + training.reference(pairs),
        }
        found, all_rates = {name: [] for name in work}, []
        for number in range(args.rounds):
            told, rates, batch = [], (gemm_rate(), read_rate()), number % len(batches)
            turn = {
                "sample": sampler.ask("sample", texts)[0],
                "kl": trainer.ask("reference", batch),
                "dpo": trainer.ask("step", batch)[0],
            }
            for name, took in turn.items():
                share = seconds(work[name], parse("cpu", rates), "float32").total / took
                found[name].append(share)
                told.append(f"{name} {took:.1f} s, {share:.0%}")
            print(
                f"round {number + 1} of {args.rounds}: {rates[0] / 1e9:.0f} GFLOP/s, "
                f"{rates[1] / 1e9:.0f} GB/s; {', '.join(told)}",
                flush=True,
            )
            all_rates.append(rates)
        sampler.close()
        trainer.close()
    shares = {name: round(min(1.0, statistics.median(each)), 2) for name, each in found.items()}
    with open(args.out, "w") as file:
        json.dump(shares, file)
    gemm, memory = (statistics.median(each) / 1e9 for each in zip(*all_rates))
    print(
        f"{args.out}: {json.dumps(shares)}\npython -m scripts.plan demo --efficiency {args.out} "
        f"--cpu-rates {gemm:.0f} {memory:.0f}"
    )
