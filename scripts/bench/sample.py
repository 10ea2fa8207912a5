"""The sampling engine: ours against transformers' generate, and where each millisecond goes."""

import dataclasses
import tempfile
import time
from functools import partial

import numpy as np
from etils import epy

from scripts.bench import machine
from sharding.errors import UserError
from stages.files.rows import Prompt, read

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax
    import jax.numpy as jnp

    from model import checkpoint, decoder, drawing, generate, kv_cache, packing
    from scripts.bench import measuring


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
    """Batch sizes (answers) that transformers is timed at in its first turn; it goes on with the
    best."""
    rounds: int = 2
    """Turns of each side; the best of each counts."""


def bench(args: Sample) -> None:
    prompts = _prompts(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder, hf_folder = machine.two_formats(args.checkpoint, temporary)
        sides = {
            "ours": machine.Side(Ours, folder, args, prompts),
            "transformers": machine.Side(Theirs, hf_folder, args, prompts),
        }
        ours, theirs = sides.values()
        first = ours.ask("sample")[0]
        work = {name: lambda _, side=side: side.ask("sample") for name, side in sides.items()}
        results, _ = machine.in_turns("round", range(args.rounds), work)
        best = {name: min(done, key=lambda d: d[0] / d[1]) for name, done in results.items()}
        rates = {name: tokens / seconds for name, (seconds, tokens, *_) in best.items()}
        seconds, _, parts = best["ours"]
        details = {
            "ours": f"{args.slots} slots, the first time {first - seconds:.0f} s more, to compile",
            "transformers": f"batch {theirs.ask('batch')}",
        }
        for name, (took, tokens, *_) in best.items():
            rate = f"{rates[name]:.0f} tokens/s ({tokens} in {took:.1f} s)"
            machine.report(name, sides[name], rate, details[name])
        theirs.close()
        print(f"ratio {rates['ours'] / rates['transformers']:.2f}")
        told = [f"{name} {took:.1f} s ({calls} calls)" for name, (took, calls) in parts.items()]
        rest = seconds - sum(took for took, _ in parts.values())
        print(f"a whole run: {', '.join(told)}, the host's own work {rest:.1f} s")
        _account(ours.ask("account"))
        ours.close()


def _prompts(args: Sample) -> list[str]:
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
    def __init__(self, folder: str, args: Sample, prompts: list[str]):
        self.config, params = checkpoint.load(folder)
        tokenizer = checkpoint.open_folder(folder)[1]
        self.prompts = [
            (str(i), tokenizer.prompt_ids([{"role": "user", "content": text}]))
            for i, text in enumerate(prompts)
        ]
        self.sampling = generate.Sampling(
            args.n, args.temperature, args.top_p, max_new_tokens=args.max_new_tokens
        )
        self.slots, self.longest = args.slots, max(len(ids) for _, ids in self.prompts)
        self.parts: dict[str, tuple[float, int]] = {}  # name → seconds, calls
        self.sampler = generate.Sampler(
            self.config, params, tokenizer.decode, self.sampling, self.slots, self.longest
        )
        self.sampler.advance = self._watch("decode steps", self.sampler.advance)
        self.sampler.admit = self._watch("prefill", self.sampler.admit)

    def _watch(self, name: str, function):
        def watched(*args):
            seconds, result = machine.timed(
                lambda: (function(*args), jax.block_until_ready(self.sampler.state))[0]
            )
            before, calls = self.parts.get(name, (0.0, 0))
            self.parts[name] = before + seconds, calls + 1
            return result

        return watched

    def sample(self) -> tuple[float, int, dict]:
        """(seconds, tokens, {part: (seconds, calls)})."""
        self.parts.clear()
        seconds, drawn = machine.timed(
            lambda: [a for _, each in self.sampler.run(self.prompts) for a in each]
        )
        tokens = sum(len(a.token_ids) + (a.finish_reason == "stop") for a in drawn)
        return seconds, tokens, dict(self.parts)

    def account(self) -> dict:
        """A decode step and its pieces, name → (seconds, operations of products, bytes read)."""
        c, slots, params = self.config, self.slots, self.sampler.params
        length = packing.coarse_bucket(self.longest + self.sampling.max_new_tokens)
        call = measuring.DecodeCall(c, params, self.sampling, slots, length, jnp.float32)
        step = min(call() for _ in range(3))
        tokens_b, uniform_b = call.state["last"], jnp.full(slots, 0.5)
        decode = jax.jit(partial(kv_cache.decode, config=c), donate_argnames="cache")

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
        products, _ = decode_time(kv_cache.empty_cache(c, slots, 32), 31)
        logits = jax.jit(lambda params, hidden_bd: decoder.logits(params, c, hidden_bd))
        draw = jax.jit(lambda logits_bv, u_b: drawing.draw(logits_bv, u_b, call.state["settings"]))
        head = {k: v for k, v in params.items() if k != "layers"}
        logits_bv = logits(head, hidden_bd)
        weights = sum(x.size for x in jax.tree.leaves(params["layers"]))
        vocabulary = c.vocab_size * c.hidden_size
        scores = 4 * slots * c.num_attention_heads * c.head_dim * c.num_hidden_layers * length
        cached = slots * kv_cache.cache_bytes(c, length)
        vocabulary_time = machine.best_seconds(logits, head, hidden_bd)
        return {
            "slots": slots,
            "length": length,
            "seconds": step,
            "gemm": machine.gemm_rate(),
            "read": machine.read_rate(),
            "parts": {
                "products with the layers": (products, 2 * slots * weights, 4 * weights),
                "attention over the cache": (whole - products, scores, cached),
                "the vocabulary product": (vocabulary_time, 2 * slots * vocabulary, 4 * vocabulary),
                "drawing": (
                    machine.best_seconds(draw, logits_bv, uniform_b),
                    0,
                    4 * logits_bv.size,
                ),
            },
        }


class Theirs(machine.Worker):
    def __init__(self, folder: str, args: Sample, prompts: list[str]):
        import torch  # here: heavy, and for this side alone
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.args, self.sizes = args, args.batches
        self.chats = [[{"role": "user", "content": text}] for text in prompts]
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        self.eos = np.atleast_1d(self.model.generation_config.eos_token_id).tolist()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = self.eos[0]

    def sample(self) -> tuple[float, int]:
        """(seconds, tokens)."""
        return self.quickest(self._sample, amount=lambda tokens: tokens)

    def _sample(self, batch: int) -> int:
        tokens, chats = 0, max(1, batch // self.args.n)
        for at in range(0, len(self.chats), chats):
            inputs = self.tokenizer.apply_chat_template(
                self.chats[at : at + chats],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            answers = self.model.generate(
                **inputs,
                do_sample=True,
                temperature=self.args.temperature,
                top_p=self.args.top_p,
                top_k=0,
                num_return_sequences=self.args.n,
                max_new_tokens=self.args.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            for answer in answers[:, inputs["input_ids"].shape[1] :].numpy():
                ends = np.flatnonzero(np.isin(answer, self.eos))
                tokens += int(ends[0]) + 1 if len(ends) else len(answer)
        return tokens
