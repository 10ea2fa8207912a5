"""The sampling engine: ours against transformers' generate, and where each millisecond goes."""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from etils import epy

from scripts.bench import machine
from sharding.errors import UserError
from stages import sample as stage
from stages.files.rows import Prompt, read

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax
    import jax.numpy as jnp

    from model import checkpoint, decoder, drawing, generate, kv_cache, packing, precision
    from scripts.bench import measuring
    from sharding import mesh as meshes


@dataclasses.dataclass
class Sample(machine.BenchFlags):
    """Sampling: ours against transformers' generate with the same weights and real prompts, each in
    float32 and bfloat16.

    Tokens count up to each answer's end, its EOS included. Before it is timed, ours draws
    everything once, and transformers the first tokens of one batch with each kind of attention
    (eager, sdpa), then with the faster one at the other batch sizes; it goes on with the fastest.
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
    """Batch sizes (answers) that transformers chooses from."""
    first_tokens: int = 32
    """How many tokens per answer it draws to choose."""
    turns: int = 2
    """Turns of the last of --precisions. The other one takes part in the first turn alone."""


def bench(args: Sample) -> None:
    prompts = read_prompts(args)
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = machine.two_formats(args.checkpoint, temporary)
        sides = [
            machine.Side(name, dtype, kind, folder, args, prompts)
            for dtype in args.precisions
            for name, kind, folder in (("ours", Ours, ours), ("transformers", Theirs, theirs))
        ]
        for side in sides:
            side.ask("warm")
        machine.in_turns("turn", [1], sides)
        last = [side for side in sides if side.dtype == args.precisions[-1]]
        machine.in_turns("turn", range(2, args.turns + 1), last)
        for side in sides:
            machine.report(side, "tokens/s")
        fastest = machine.compare(sides)
        for side in sides:
            if side is not fastest:
                side.close()
        _, (seconds, _, _, parts) = fastest.turns[-1]
        told = [f"{name} {took:.1f} s" for name, took in parts.items()]
        rest = seconds - sum(parts.values())
        print(f"{fastest.title}: {', '.join(told)}, the host's own work {rest:.1f} s")
        _account(fastest.ask("account"))
        fastest.close()


def read_prompts(args: Sample) -> list[str]:
    if args.prompts is not None:
        texts = [row.prompt for row in read(args.prompts, Prompt)]
    else:
        rows = machine.alpaca_eval("gpt4_1106_preview", instead="give --prompts, or ")
        texts = [row["instruction"] for (row,) in rows]
    if len(texts) < args.count:
        raise UserError(f"{len(texts)} prompts are fewer than --count {args.count}")
    return machine.spread(texts, args.count)


def _account(step: dict) -> None:
    """A decode step piece by piece, measured, against what products and bytes must take."""
    gemm, read, whole = step["gemm"], step["read"], step["seconds"]
    print(
        f"a step of {step['slots']} slots at {step['length']} positions, ms; the limit: "
        f"products at {gemm / 1e9:.0f} GFLOP/s, then bytes at {read / 1e9:.1f} GB/s"
    )
    rest, limits = whole, 0.0
    for name, (seconds, flops, size) in step["parts"].items():
        products, limit = flops / gemm, flops / gemm + size / read
        print(
            f"  {name:28s} {1e3 * seconds:7.1f}   limit {1e3 * limit:7.1f} "
            f"= {1e3 * products:.1f} + {1e3 * (limit - products):.1f}"
        )
        rest, limits = rest - seconds, limits + limit
    print(f"  {'what is left':28s} {1e3 * rest:7.1f}")
    total = f"limit {1e3 * limits:7.1f} ({limits / whole:.0%})"
    print(f"  {'a step':28s} {1e3 * whole:7.1f}   {total}")


# ------------------------------------------------------------------------------ the sides


class Ours(machine.Worker):
    def __init__(self, dtype: machine.Dtype, folder: str, args: Sample, prompts: list[str]):
        super().__init__(dtype)
        self.precision, self.slots = precision.precision_of(dtype), args.slots
        self.config, tokenizer = checkpoint.open_folder(folder)
        self.prompts = [
            (str(i), tokenizer.prompt_ids([{"role": "user", "content": text}]))
            for i, text in enumerate(prompts)
        ]
        how = {
            name: getattr(args, name) for name in ("n", "temperature", "top_p", "max_new_tokens")
        }
        flags = stage.Args(
            checkpoint=folder, prompts="", out="", slots=args.slots, dtype=dtype, **how
        )
        self.sampling, self.mesh = generate.Sampling(**how), meshes.make_mesh()
        self.longest, count = max(len(ids) for _, ids in self.prompts), len(self.prompts)
        what = self.config, tokenizer, self.sampling, self.mesh, self.longest, count
        with jax.set_mesh(self.mesh):
            self.samplers = stage.load_samplers(flags, *what, bar=sys.stderr)
        self.way = f"{self.slots} slots" + " in two parts" * (len(self.samplers) > 1)
        self.calls: list[tuple[str, float]] = []  # (part of the work, seconds), of all samplers
        for sampler in self.samplers:
            sampler.advance = self._watch("decode steps", sampler, sampler.advance)
            sampler.admit = self._watch("prefill", sampler, sampler.admit)

    def _watch(self, name: str, sampler, function):
        def watched(*args):
            seconds, result = machine.timed(
                lambda: (function(*args), jax.block_until_ready(sampler.state))[0]
            )
            self.calls.append((name, seconds))
            return result

        return watched

    def answers(self, prompts: list[tuple[str, list[int]]]) -> Iterator[tuple[str, list]]:
        with jax.set_mesh(self.mesh):
            yield from generate.run_side_by_side(self.samplers, prompts)

    def warm(self) -> None:
        seconds, *_ = self.work(0)
        self.way += f", the first time {seconds:.0f} s, compiling included"

    def work(self, _: int) -> tuple[float, int, None, dict]:
        """(seconds, tokens, None, {part: seconds, the mean of the samplers})."""
        self.calls.clear()
        seconds, drawn = machine.timed(
            lambda: [answer for _, each in self.answers(self.prompts) for answer in each]
        )
        tokens = sum(len(a.token_ids) + (a.finish_reason == "stop") for a in drawn)
        parts = dict.fromkeys((name for name, _ in self.calls), 0.0)
        for name, took in self.calls:
            parts[name] += took / len(self.samplers)
        return seconds, tokens, None, parts

    def account(self) -> dict:
        """A decode step and its pieces, name → (seconds, operations of products, bytes read)."""
        c, slots, params = self.config, self.slots, self.samplers[0].params
        operands, activations = self.precision
        length = packing.coarse_bucket(self.longest + self.sampling.max_new_tokens)
        count = len(self.samplers)
        calls = [
            measuring.DecodeCall(c, params, self.sampling, rows, length, operands)
            for rows in ([] if count == 1 else [slots // count] * count) + [slots]
        ]
        call = calls.pop()
        with ThreadPoolExecutor(count) as pool:  # side by side, as in a run
            together = [[*pool.map(lambda c: c(), calls or [call])] for _ in range(3)]
        step = min(map(max, together))
        tokens_b, uniform_b = call.state["last"], jnp.full(slots, 0.5)
        decode = jax.jit(
            partial(kv_cache.decode, config=c, precision=self.precision), donate_argnames="cache"
        )

        def decode_time(cache, at: int):
            took, positions_b = [], jnp.full(slots, at)
            for _ in range(6):
                begun = time.perf_counter()
                hidden_bd, cache = decode(
                    params, cache=cache, tokens_b=tokens_b, positions_b=positions_b
                )
                jax.block_until_ready(hidden_bd)
                took.append(time.perf_counter() - begun)
            return min(took), hidden_bd

        whole, hidden_bd = decode_time(call.state.pop("cache"), length - 1)
        products, _ = decode_time(kv_cache.empty_cache(c, slots, 32, activations), 31)
        logits = jax.jit(lambda params, hidden_bd: decoder.logits(params, c, hidden_bd, operands))
        draw = jax.jit(lambda logits_bv, u_b: drawing.draw(logits_bv, u_b, call.state["settings"]))
        head = {k: v for k, v in params.items() if k != "layers"}
        logits_bv = logits(head, hidden_bd)
        weights = sum(x.size for x in jax.tree.leaves(params["layers"]))
        vocabulary = c.vocab_size * c.hidden_size
        scores = 4 * slots * c.num_attention_heads * c.head_dim * c.num_hidden_layers * length
        cached = slots * kv_cache.cache_bytes(c, length, activations)
        vocabulary_time = machine.best_seconds(logits, head, hidden_bd)
        return {
            "slots": slots,
            "length": length,
            "seconds": step,
            "gemm": self.gemm(),
            "read": machine.read_rate(),
            "parts": {
                "products with the layers": (
                    products,
                    2 * slots * weights,
                    operands.itemsize * weights,
                ),
                "attention over the cache": (whole - products, scores, cached),
                "the vocabulary product": (
                    vocabulary_time,
                    2 * slots * vocabulary,
                    operands.itemsize * vocabulary,
                ),
                "drawing": (
                    machine.best_seconds(draw, logits_bv, uniform_b),
                    0,
                    4 * logits_bv.size,
                ),
            },
        }


class Theirs(machine.Worker):
    library = "PyTorch"

    def __init__(self, dtype: machine.Dtype, folder: str, args: Sample, prompts: list[str]):
        import torch  # here: heavy, and for this side alone
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__(dtype)
        self.args = args
        self.chats = [[{"role": "user", "content": text}] for text in prompts]
        kind = getattr(torch, dtype)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        self.eos = np.atleast_1d(self.model.generation_config.eos_token_id).tolist()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = self.eos[0]

    def warm(self) -> None:
        """Choose the kind of attention, then the batch size, that draw the first tokens fastest."""
        self._generate(self.chats[:1], 2)
        rates: dict[tuple[str, int], float] = {}

        def attempt(attention: str, batch: int) -> None:
            self.model.set_attn_implementation(attention)
            chats = self.chats[: self._prompts(batch)]
            seconds, tokens = machine.timed(self._generate, chats, self.args.first_tokens)
            rates[attention, batch] = tokens / seconds

        first, *others = self.args.batches
        for attention in ("eager", "sdpa"):
            attempt(attention, first)
        faster, _ = max(rates, key=rates.get)
        for batch in others:
            attempt(faster, batch)
        attention, self.batch = max(rates, key=rates.get)
        self.model.set_attn_implementation(attention)
        told = (f"{' '.join(map(str, way))} {rate:.0f}" for way, rate in rates.items())
        self.way = f"{attention} attention, batch {self.batch} (first tokens/s: {', '.join(told)})"

    def work(self, _: int) -> tuple[float, int, None]:
        """(seconds, tokens, None)."""
        step, limit = self._prompts(self.batch), self.args.max_new_tokens
        batches = [self.chats[at : at + step] for at in range(0, len(self.chats), step)]
        return *machine.timed(lambda: sum(self._generate(x, limit) for x in batches)), None

    def _prompts(self, batch: int) -> int:
        """How many prompts a batch of so many answers has."""
        return max(1, batch // self.args.n)

    def _generate(self, chats: list, max_new_tokens: int) -> int:
        """How many tokens it drew."""
        inputs = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        answers = self.model.generate(
            **inputs,
            do_sample=True,
            temperature=self.args.temperature,
            top_p=self.args.top_p,
            top_k=0,
            num_return_sequences=self.args.n,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        tokens = 0
        for answer in answers[:, inputs["input_ids"].shape[1] :].numpy():
            ends = np.flatnonzero(np.isin(answer, self.eos))
            tokens += int(ends[0]) + 1 if len(ends) else len(answer)
        return tokens
