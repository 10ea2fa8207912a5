"""Sample answers to prompts. checkpoint + prompts.jsonl → samples.jsonl

    python -m stages.sample --checkpoint C --prompts prompts.jsonl --out samples.jsonl --n 5

Each row gains `prompt_token_ids` and `responses`: n times {text, token_ids, logprob,
finish_reason}. Rows are written as their answers end; a run that is stopped goes on where it was.
A prompt too long for the model's context (less --max-new-tokens) is set aside with its reason.
"""

import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from tqdm import tqdm

from stages import records
from stages.records import Manifest, Output, UserError


@dataclasses.dataclass
class Args:
    checkpoint: str  # the model that answers: a checkpoint folder
    prompts: str  # prompts.jsonl: rows with prompt (text) or messages
    out: str  # samples.jsonl
    n: int = 5  # answers a prompt
    temperature: float = 0.7  # 0: greedy
    top_p: float = 0.9  # 1: no cut
    top_k: int = 0  # 0: no cut
    max_new_tokens: int = 256  # an answer longer than this ends with finish_reason "length"
    stop_strings: tuple[str, ...] = ()  # an answer also ends before any of these
    seed: int = 0
    slots: int = 64  # answers in the making at a time; more is faster, and takes more memory
    dtype: Literal["float32", "bfloat16"] = "float32"  # of computation; bfloat16 on accelerators
    mesh: tuple[int, int, int] = (1, -1, 1)  # devices along data, fsdp, tensor; -1: the rest
    overwrite: bool = False  # replace an --out that is there


def main(args: Args) -> None:
    import jax  # after the command line is parsed: --help answers at once
    import jax.numpy as jnp

    from model import checkpoint, generate, mistral
    from model.tokenizer import ChatTokenizer, TokenizerError
    from sharding.mesh import make_mesh, tree_shardings

    try:
        sampling = generate.Sampling(
            args.n, args.temperature, args.top_p, args.top_k, args.max_new_tokens, args.seed,
            args.stop_strings,
        )  # fmt: skip
        if args.slots < 1:
            raise ValueError(f"slots is {args.slots}: it must be at least 1")
        config = checkpoint.load_config(args.checkpoint)
        identity = checkpoint.identity(args.checkpoint)
        tokenizer = ChatTokenizer.from_folder(args.checkpoint, config.eos_token_ids)
        mesh = make_mesh(*args.mesh)
    except (ValueError, TokenizerError) as error:
        raise UserError(str(error)) from error

    limit = config.max_position_embeddings - args.max_new_tokens
    if limit < 1:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in the "
            f"model's context of {config.max_position_embeddings} tokens: lower it"
        )
    counts: Counter = Counter()
    order, longest = [], 1
    for where, row in records.read_prompts(args.prompts, counts):
        order.append(row["prompt_id"])
        length = len(_token_ids(tokenizer, row, where))
        longest = max(longest, length if length <= limit else 1)
    if not order:
        raise UserError(f"{args.prompts} holds no prompts: write one a line")
    records.read_lineage(args.prompts)
    manifest = Manifest(
        stage="sample",
        arguments={**dataclasses.asdict(sampling), "dtype": args.dtype},
        inputs={args.prompts: records.file_sha256(args.prompts)},
        identities={
            "model": identity,
            "tokenizer": tokenizer.identity,
            "chat_template": tokenizer.template_identity,
        },
    )
    output = Output.open(args.out, manifest, args.overwrite)
    if output.finished:
        return

    rows: dict[str, records.Row] = {}  # prompts whose answers are in the making

    def prompts() -> Iterator[tuple[str, list[int]]]:
        for where, row in records.read_prompts(args.prompts, Counter()):
            if output.has(row["prompt_id"]):
                continue
            row["prompt_token_ids"] = _token_ids(tokenizer, row, where)
            if len(row["prompt_token_ids"]) > limit:
                output.set_aside(row, f"prompt longer than {limit} tokens")
                progress.update()
                continue
            rows[row["prompt_id"]] = row
            yield row["prompt_id"], row["prompt_token_ids"]

    slots = min(args.slots, args.n * len(order))
    progress = tqdm(total=len(order), initial=len(output), unit=" prompts", desc="sample")
    with progress, jax.set_mesh(mesh), records.stop_signal() as check_stop:
        shardings = tree_shardings(mesh, mistral.logical_axes(config), mistral.abstract(config))
        try:
            params = checkpoint.load(args.checkpoint, shardings)[1]
        except checkpoint.CheckpointError as error:
            raise UserError(str(error)) from error
        dtype = jnp.dtype(args.dtype)
        if dtype != jnp.float32:
            params = mistral.cast(params, dtype)
        sampler = generate.Sampler(
            config, params, tokenizer.decode, sampling, slots, longest, dtype
        )
        start = time.monotonic()
        for prompt_id, answers in sampler.run(prompts(), check_stop):
            row = rows.pop(prompt_id)
            row["responses"] = [dataclasses.asdict(answer) for answer in answers]
            output.write(row)
            rate = sampler.tokens_drawn / (time.monotonic() - start)
            progress.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            progress.update()
    seconds = time.monotonic() - start
    # Of this sitting alone: a run that was stopped before drew the rest then.
    sitting = {"tokens": sampler.tokens_drawn, "seconds": round(seconds, 1), "slots": slots}
    output.finish(iter(order), counts, {"last_sitting": sitting})


def _token_ids(tokenizer, row: records.Row, where: str) -> list[int]:
    from model.tokenizer import TokenizerError

    try:
        return tokenizer.prompt_ids(records.messages_of(row, where))
    except TokenizerError as error:
        raise UserError(f"{where}: {error}") from error


if __name__ == "__main__":
    sys.exit(records.run(main, Args))
