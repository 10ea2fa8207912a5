"""How far a model is from the one that sampled: samples.jsonl and a checkpoint to an estimate."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
from tqdm import tqdm

from model.packing import Sequence, pack
from sharding.errors import UserError
from sharding.watch import Flags
from stages.evaluate.winrates import standard_error
from stages.files.output import Manifest, Output, read_lineage
from stages.files.paths import file_sha256
from stages.files.rows import Row, field, read_rows
from stages.files.run import STOPPED_TOGETHER, stop_signal


@dataclasses.dataclass
class Kl(Flags):
    """KL(the model that sampled ‖ --checkpoint), a token and an answer, from samples alone.

    The mean over the samples of log-prob under the model that drew them, which they record, less
    log-prob of the same tokens under --checkpoint. Where they were drawn at temperature 1 without
    top-p and the like, it estimates the KL divergence without bias; drawn more sharply, it is the
    same difference over the answers that the model gives that way. Standard errors are over
    prompts.
    """

    checkpoint: str
    """The other model: a checkpoint folder."""
    samples: str
    """samples.jsonl with token_ids and logprob, as stages.sample writes it."""
    out: str
    """The JSON file to write."""
    prompts: int | None = None
    """Only the first so many prompts of the samples, for a cheap estimate; default: all."""
    batch_size: int = 32
    """Answers in memory at a time, at least a prompt's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of computation; bfloat16 on accelerators."""
    mesh: tuple[int, int, int] | None = None
    """Devices along data, fsdp, tensor; -1: the rest. Default: as stages.dpo."""
    overwrite: bool = False
    """Replace an --out that is there."""


@dataclasses.dataclass
class Answered:
    """A prompt's answers as token ids, and what the sampler made of them."""

    prompt_id: str
    sequence: Sequence  # responses with the EOS that they ended with
    logprobs: list[float]

    def tokens(self) -> int:
        return sum(map(len, self.sequence.responses))


def main(args: Kl) -> None:
    from model import checkpoint
    from model.tokenizer import ChatTokenizer
    from sharding import processes

    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}: it must be at least 1")
    if args.prompts is not None and args.prompts < 1:
        raise UserError(f"--prompts is {args.prompts}: it must be at least 1")
    try:
        processes.start(args)
        config = checkpoint.load_config(args.checkpoint)
        identity = checkpoint.identity(args.checkpoint)
        tokenizer = ChatTokenizer.from_folder(args.checkpoint, config.eos_token_ids)
    except (ValueError, UserError) as error:
        raise UserError(str(error)) from error
    lineage = read_lineage(args.samples)
    sampler = lineage.identities if lineage else {}
    if sampler.get("tokenizer", tokenizer.identity) != tokenizer.identity:
        raise UserError(
            f"{args.samples}: sampled with another tokenizer than {args.checkpoint}'s: its token "
            "ids mean something else there"
        )
    manifest = Manifest(
        stage="evaluate kl",
        arguments={"dtype": args.dtype, "prompts": args.prompts},
        inputs={args.samples: file_sha256(args.samples)},
        identities={"sampler": sampler.get("model", "unknown"), "model": identity},
    )
    if not processes.agree(json.dumps(manifest.key())):
        raise UserError("the processes were given different samples or checkpoints")
    # Of several processes on one mesh, only the first has an output.
    output = None
    if processes.is_first():
        output = Output.open(args.out, manifest, args.overwrite)
    if processes.from_first(np.array(output is not None and output.finished)):
        return
    counts: Counter = Counter()
    prompts = list(_read(args, tokenizer, config, counts))
    counts["out"] = len(prompts)
    if not prompts:
        raise UserError(f"{args.samples}: no answers can be used")
    done = processes.from_first(
        np.array([output is not None and output.has(p.prompt_id) for p in prompts])
    )
    _compute(args, config, [p for p, is_done in zip(prompts, done) if not is_done], output)
    if output is not None:
        _finish(args, output, prompts, counts, lineage)
    processes.wait()


def _finish(args: Kl, output: Output, prompts: list[Answered], counts: Counter, lineage) -> None:
    """Write and tell the estimate; of all prompts' log-probs, which `output` holds."""
    known = {row["prompt_id"]: row["logprobs"] for row, _ in output.rows()}
    logprobs = [np.array(known[p.prompt_id]) for p in prompts]
    drawn = {
        name: value
        for name, value in (lineage.arguments if lineage else {}).items()
        if name in ("temperature", "top_p", "top_k", "min_p")
    }
    content = estimate(prompts, logprobs) | {
        "checkpoint": args.checkpoint,
        "samples": args.samples,
        "first_prompts": args.prompts,
        "drawn_with": drawn,
    }
    output.finish_as(content, counts, content)
    print(
        f"KL a token {content['kl_per_token']:.4f} ± {_number(content['standard_error'])}, an "
        f"answer {content['kl_per_answer']:.3f} ± "
        f"{_number(content['standard_error_per_answer'])}"
    )
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    if any(value != plain[name] for name, value in drawn.items()):
        print("(drawn more sharply than the model itself, so of its likelier answers alone)")


def estimate(prompts: list[Answered], logprobs: list[np.ndarray]) -> dict:
    """The rates a token and an answer: ratios of means over prompts, with the errors of their
    residuals (Cochran 1977, 6.4)."""
    answers = np.array([len(p.logprobs) for p in prompts], float)
    ahead = np.array([np.sum(np.array(p.logprobs) - q) for p, q in zip(prompts, logprobs)])
    tokens = np.array([p.tokens() for p in prompts], float)

    def ratio(of: np.ndarray) -> tuple[float, float | None]:
        rate = ahead.sum() / of.sum()
        error = standard_error(ahead - rate * of)
        return float(rate), None if error is None else error / float(of.mean())

    a_token, token_error = ratio(tokens)
    an_answer, answer_error = ratio(answers)
    return {
        "kl_per_token": a_token,
        "standard_error": token_error,
        "kl_per_answer": an_answer,
        "standard_error_per_answer": answer_error,
        "n": int(answers.sum()),
        "prompts": len(prompts),
        "tokens": int(tokens.sum()),
    }


def _number(error: float | None) -> str:
    return "?" if error is None else f"{error:.2g}"


def _read(args: Kl, tokenizer, config, counts: Counter) -> Iterator[Answered]:
    for where, row in islice(read_rows(args.samples), args.prompts):
        counts["in"] += 1
        prompt_id = field(row, "prompt_id", str, where)
        prompt = _token_ids(row, "prompt_token_ids", config, where)
        responses, logprobs = [], []
        for i, response in enumerate(field(row, "responses", list, where)):
            at = f"{where}, responses[{i}]"
            if not isinstance(response, dict):
                raise UserError(f"{at}: {type(response).__name__}, not an object")
            ids = _token_ids(response, "token_ids", config, at)
            ended = response.get("finish_reason") == "stop" and tokenizer.eos_ids
            responses.append(ids + [tokenizer.eos_ids[0]] if ended else ids)
            logprobs.append(float(field(response, "logprob", (int, float), at)))
        longest = max(map(len, responses), default=0)
        if not prompt or not responses or not all(responses):
            counts["set aside: empty prompt or response"] += 1
        elif len(prompt) + longest > config.max_position_embeddings:
            counts["set aside: beyond the model's context"] += 1
        else:
            yield Answered(prompt_id, Sequence(prompt, responses), logprobs)


def _token_ids(row: Row, name: str, config, where: str) -> list[int]:
    ids = field(row, name, list, where)
    if not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        raise UserError(f"{where}: field {name!r} holds what is no token id of this model")
    return ids


def _compute(args: Kl, config, prompts: list[Answered], output: Output | None) -> None:
    """Write a row {prompt_id, logprobs} for each prompt: log π(response | prompt) of its answers
    under --checkpoint. output None: another process writes."""
    if not prompts:
        return
    import jax
    import jax.numpy as jnp

    from model import checkpoint, decoder, logprobs
    from sharding import processes
    from sharding.mesh import (
        batch_shards,
        make_mesh,
        put_batch,
        replicated,
        training_sizes,
        tree_shardings,
    )

    try:
        mesh = make_mesh(*args.mesh or training_sizes(jax.device_count(), config))
    except ValueError as error:
        raise UserError(str(error)) from error
    most = max(args.batch_size, max(len(p.logprobs) for p in prompts))
    with jax.set_mesh(mesh), stop_signal() as check_stop:
        shardings = tree_shardings(mesh, decoder.logical_axes(config), decoder.abstract(config))
        try:
            params = checkpoint.load(args.checkpoint, shardings)[1]
        except checkpoint.UserError as error:
            raise UserError(str(error)) from error
        dtype = jnp.dtype(args.dtype)

        @partial(jax.jit, out_shardings=replicated(mesh))
        def compute(params, batch):
            return logprobs.response_logprobs(params, config, batch, most, dtype)

        batches = _batches(prompts, most)
        for indices in tqdm(batches, desc="kl", unit=" batches", disable=output is None):
            batch = pack([prompts[i].sequence for i in indices], batch_shards(mesh))
            values = np.asarray(jax.device_get(compute(params, put_batch(mesh, batch))))
            ends = np.cumsum([len(prompts[i].logprobs) for i in indices])
            for i, mine in zip(indices, np.split(values[: ends[-1]], ends[:-1])):
                if output is not None:
                    output.write({"prompt_id": prompts[i].prompt_id, "logprobs": mine.tolist()})
            processes.all_check(check_stop, STOPPED_TOGETHER)


def _batches(prompts: list[Answered], most: int) -> list[list[int]]:
    """Indices of prompts, of about as many tokens each, so that few shapes are compiled."""
    by_length = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].sequence), i))
    widest = max(len(p.logprobs) for p in prompts)
    count = math.ceil(len(prompts) / max(1, most // widest))
    return [by_length[m::count] for m in range(count)]
