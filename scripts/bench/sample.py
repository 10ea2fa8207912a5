"""The sampling engine: ours against transformers' generate, and where each millisecond goes."""

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
from scripts.plan.slices import gemm_rate, read_rate
from sharding.errors import UserError
from stages.files.rows import Prompt, read

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax
    import jax.numpy as jnp

    from model import checkpoint, generate, kv_cache
    from model import tokenizer as tokenizers


@dataclasses.dataclass
class Sample:
    """Sampling: ours against transformers' generate with the same weights and real prompts, fp32.

    Tokens count up to each answer's end, its EOS included. Ours draws everything once before it is
    timed: what the first time takes longer is compiling.
    """

    checkpoint: str | None = None
    """A checkpoint folder; default: the demo's model, converted for the run."""
    prompts: str | None = None
    """A prompts.jsonl; default: AlpacaEval's instructions, where the tests' data lies."""
    count: int = 16
    """So many prompts, spread over the file."""
    n: int = 5
    """Answers a prompt."""
    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.9
    slots: int = 80
    """Of ours."""
    batches: tuple[int, ...] = (80, 20)
    """Batch sizes (answers) that transformers is timed at; the best counts."""
    rounds: int = 2
    """Turns of each side; the best of each counts."""


def bench(args: Sample) -> None:
    prompts = _prompts(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder, hf_folder = two_formats(args.checkpoint, temporary)
        ours, theirs = Side(our_worker, folder, args), Side(_their_worker, hf_folder, args)
        first = ours.ask("sample", prompts)[0]
        batches = dict.fromkeys(args.batches, (float("inf"), 1))
        best = float("inf"), 1, {}
        for number in range(args.rounds):
            best = min(best, ours.ask("sample", prompts), key=lambda found: found[0])
            took = [f"ours {best[1] / best[0]:.0f} tokens/s"]
            for batch in args.batches if number == 0 else [_best(batches)]:
                found = theirs.ask("sample", (prompts, batch))
                batches[batch] = min(batches[batch], found)
                took.append(f"transformers at batch {batch} {found[1] / found[0]:.0f} tokens/s")
            print(f"round {number + 1} of {args.rounds}: {', '.join(took)}", flush=True)
        theirs_memory, ours_memory = theirs.ask("memory"), ours.ask("memory")
        theirs.close()
        seconds, tokens, parts = best
        batch = _best(batches)
        their_seconds, their_tokens = batches[batch]
        ours_rate, their_rate = tokens / seconds, their_tokens / their_seconds
        print(
            f"ours          {ours_rate:.0f} tokens/s ({tokens} in {seconds:.1f} s), "
            f"{args.slots} slots, peak {ours_memory / 2**30:.2f} GiB; the first time "
            f"{first - seconds:.0f} s more, to compile"
        )
        print(
            f"transformers  {their_rate:.0f} tokens/s ({their_tokens} in {their_seconds:.1f} s), "
            f"batch {batch}, peak {theirs_memory / 2**30:.2f} GiB"
        )
        print(f"ratio {ours_rate / their_rate:.2f}")
        _report(parts, seconds)
        _account(ours.ask("account"))
        ours.close()


def _best(batches: dict[int, tuple[float, int]]) -> int:
    return max(batches, key=lambda batch: batches[batch][1] / batches[batch][0])


def _prompts(args: Sample) -> list[str]:
    if args.prompts is not None:
        texts = [row.prompt for row in read(args.prompts, Prompt)]
    else:
        data = Path(os.environ.get("ALIGN_TEST_DATA", "../shared/data")) / "alpaca_eval"
        if not data.is_dir():
            raise UserError(f"{data} does not exist: give --prompts, or set ALIGN_TEST_DATA")
        rows = json.loads((data / "gpt4_1106_preview.json").read_text())
        texts = [row["instruction"] for row in rows]
    if len(texts) < args.count:
        raise UserError(f"{len(texts)} prompts are fewer than --count {args.count}")
    return texts[:: len(texts) // args.count][: args.count]


def _report(parts: dict[str, tuple[float, int]], seconds: float) -> None:
    told = ", ".join(
        f"{name} {took:.1f} s ({calls} calls)" for name, (took, calls) in parts.items()
    )
    rest = seconds - sum(took for took, _ in parts.values())
    print(f"a whole run: {told}, the host's own work {rest:.1f} s")


def _account(pieces: dict) -> None:
    """A decode step piece by piece, measured, against what products and bytes must take."""
    gemm, read = pieces["gemm"], pieces["read"]
    print(
        f"a step of {pieces['slots']} slots at {pieces['length']} positions, ms; the limit: "
        f"products at {gemm / 1e9:.0f} GFLOP/s, then bytes at {read / 1e9:.1f} GB/s"
    )
    rest, limits = pieces["step"], 0.0
    for name, (seconds, flops, size) in pieces["parts"].items():
        limit = flops / gemm + size / read
        print(
            f"  {name:28s} {1e3 * seconds:7.1f}   limit {1e3 * limit:7.1f} "
            f"= {1e3 * flops / gemm:.1f} + {1e3 * size / read:.1f}"
        )
        rest -= seconds
        limits += limit
    print(f"  {'what is left':28s} {1e3 * rest:7.1f}")
    print(
        f"  {'a step':28s} {1e3 * pieces['step']:7.1f}   limit {1e3 * limits:7.1f} "
        f"({limits / pieces['step']:.0%})"
    )


# ------------------------------------------------------------------------------ the sides


def our_worker(pipe, folder: str, args: Sample):
    config, params = checkpoint.load(folder)
    tokenizer = tokenizers.ChatTokenizer.from_folder(folder, config.eos_token_ids)
    sampling = generate.Sampling(
        args.n, args.temperature, args.top_p, max_new_tokens=args.max_new_tokens
    )
    sampler, parts = None, {}

    def watch(name: str, function):
        def watched(*given):
            seconds, found = timed(lambda: jax.block_until_ready(function(*given)))
            before, calls = parts.get(name, (0.0, 0))
            parts[name] = before + seconds, calls + 1
            return found

        return watched

    while True:
        what, given = pipe.recv()
        if what == "sample":
            asked = [
                (str(i), tokenizer.prompt_ids([{"role": "user", "content": text}]))
                for i, text in enumerate(given)
            ]
            longest = max(len(ids) for _, ids in asked)
            if sampler is None:
                sampler = generate.Sampler(
                    config, params, tokenizer.decode, sampling, args.slots, longest
                )
                del params
                sampler._advance = watch("decode steps", sampler._advance)
                sampler._start = watch("prefill", sampler._start)
            parts.clear()
            begun = time.perf_counter()
            found = [answer for _, answers in sampler.run(asked) for answer in answers]
            seconds = time.perf_counter() - begun
            tokens = sum(len(a.token_ids) + (a.finish_reason == "stop") for a in found)
            pipe.send((seconds, tokens, dict(parts)))
        elif what == "memory":
            pipe.send(peak_memory())
        else:
            length = generate.coarse_bucket(longest + args.max_new_tokens)
            pipe.send(_step(config, sampler.params, sampling, args.slots, length))


def _step(config, params, sampling, slots: int, length: int) -> dict:
    """A decode step and its pieces: {name: (seconds, operations of products, bytes read)}."""
    steps = generate.STEPS_PER_CALL
    state = generate._empty(config, slots, length, sampling, jnp.float32)
    state |= {
        "active": jnp.ones(slots, bool),
        "prompt_lengths": jnp.full(slots, length - sampling.max_new_tokens),
        "steps": jnp.ones(slots, jnp.int32),
    }
    advance = jax.jit(
        partial(generate._advance, config=config, sampling=sampling, dtype=jnp.float32),
        donate_argnums=1,
    )
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        # No slot may end: begin again at the first token.
        state |= {"steps": jnp.ones(slots, jnp.int32), "active": jnp.ones(slots, bool)}
        state = advance(params, state, 0)
        drawn = int(jnp.max(state["steps"])) - 1
        times.append((time.perf_counter() - begun) / drawn)
    assert drawn <= steps
    tokens_b, uniform_b = state["tokens"][:, 0], jnp.full(slots, 0.5)
    cache, short = state["cache"], kv_cache.empty_cache(config, slots, 32)

    def best(function, *given):
        jax.block_until_ready(function(*given))
        return min(timed(lambda: jax.block_until_ready(function(*given)))[0] for _ in range(5))

    decode = jax.jit(partial(kv_cache.decode, config=config), donate_argnames="cache")

    def decode_time(cache, at):
        took, positions_b = [], jnp.full(slots, at)
        for _ in range(6):
            begun = time.perf_counter()
            hidden_bd, cache = decode(
                params, cache=cache, tokens_b=tokens_b, positions_b=positions_b
            )
            jax.block_until_ready(hidden_bd)
            took.append(time.perf_counter() - begun)
        return min(took), hidden_bd

    whole, hidden_bd = decode_time(cache, length - 1)
    products, _ = decode_time(short, 31)
    logits = jax.jit(lambda params, hidden_bd: kv_cache.logits(params, config, hidden_bd))
    draw = jax.jit(lambda logits_bv, u_b: generate.draw(logits_bv, u_b, sampling))
    head = {k: v for k, v in params.items() if k != "layers"}
    logits_bv = logits(head, hidden_bd)
    weights = sum(x.size for x in jax.tree.leaves(params["layers"]))
    vocabulary = config.vocab_size * config.hidden_size
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    size = kv_cache.cache_bytes(config, length)
    return {
        "slots": slots,
        "length": length,
        "step": min(times),
        "gemm": gemm_rate(),
        "read": read_rate(),
        "parts": {
            "products with the layers": (products, 2 * slots * weights, 4 * weights),
            "attention over the cache": (
                whole - products,
                4 * slots * heads * length,
                slots * size,
            ),
            "the vocabulary product": (
                best(logits, head, hidden_bd),
                2 * slots * vocabulary,
                4 * vocabulary,
            ),
            "drawing": (best(draw, logits_bv, uniform_b), 0, 4 * logits_bv.size),
        },
    }


def _their_worker(pipe, folder: str, args: Sample):
    import torch  # here: heavy, and for this side alone
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stdout(sys.stderr):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    torch.manual_seed(0)
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    tokenizer.pad_token_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    )

    def sample(texts: list[str], batch: int) -> int:
        tokens, a_time = 0, max(1, batch // args.n)
        for at in range(0, len(texts), a_time):
            chats = [[{"role": "user", "content": text}] for text in texts[at : at + a_time]]
            inputs = tokenizer.apply_chat_template(
                chats,
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            with torch.no_grad():
                found = model.generate(
                    **inputs,
                    do_sample=True,
                    temperature=args.temperature,
                    top_p=args.top_p,
                    top_k=0,
                    num_return_sequences=args.n,
                    max_new_tokens=args.max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                )
            for answer in found[:, inputs["input_ids"].shape[1] :].numpy():
                ends = np.flatnonzero(np.isin(answer, eos))
                tokens += int(ends[0]) + 1 if len(ends) else len(answer)
        return tokens

    while True:
        what, given = pipe.recv()
        pipe.send(timed(partial(sample, *given)) if what == "sample" else peak_memory())
