"""Sample answers to prompts. checkpoint + prompts.jsonl → samples.jsonl

    python -m stages.sample --checkpoint C --prompts prompts.jsonl --out samples.jsonl --n 5

Each row gains `prompt_token_ids` and `responses`: n times {text, token_ids, logprob,
finish_reason}. Rows are written as their answers end; a run that is stopped goes on where it was.
A prompt too long for the model's context (less --max-new-tokens) is set aside with its reason.

Several processes can share the work, each on devices of its own: one with --share 0 4, one with
--share 1 4, … Whichever is done last puts the shares together in the order of the prompts.

A model too large for one host's devices spans those of several: --coordinator HOST:PORT
--processes 4 and --process-id 0 to 3, the rest of the command the same. Process 0 writes.
"""

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Literal

import numpy as np
from tqdm import tqdm

from sharding.errors import UserError
from sharding.watch import Flags
from stages.files.output import Manifest, Output, read_lineage
from stages.files.paths import file_sha256
from stages.files.rows import Row, messages_of, read_prompts
from stages.files.run import STOPPED_TOGETHER, parse_bytes, run_main, stop_signal
from stages.files.shares import merge


@dataclasses.dataclass
class Args(Flags):
    checkpoint: str  # the model that answers: a checkpoint folder
    prompts: str  # prompts.jsonl: rows with prompt (text) or messages
    out: str  # samples.jsonl
    n: int = 5  # answers a prompt
    temperature: float = 0.7  # 0: greedy
    top_p: float = 0.9  # 1: no cut
    top_k: int = 0  # 0: no cut
    min_p: float = 0.0  # tokens less than so likely as the likeliest are cut; 0: no cut
    max_new_tokens: int = 256  # an answer longer than this ends with finish_reason "length"
    stop_strings: tuple[str, ...] = ()  # an answer also ends before any of these
    seed: int = 0
    # Answers in the making at a time: more is faster, and takes more memory. Default: as many as
    # --cache-memory holds, at most 64 on a CPU and 256 on accelerators.
    slots: int | None = None
    cache_memory: str | None = None
    """Of the keys and values of all slots at their longest, over all devices, e.g. 8GiB. Default:
    a quarter of a machine's free memory, four fifths of what accelerators have free."""
    dtype: Literal["float32", "bfloat16"] = "float32"  # of computation; bfloat16 on accelerators
    mesh: tuple[int, int, int] | None = None
    """Devices along data, fsdp, tensor; -1: the rest. Default: along tensor as far as the key heads
    and the MLP divide, the rest along data; along fsdp, every token would collect the weights."""
    shardings: bool = False  # print a table of what lies where: shapes, cuts, bytes a device
    share: tuple[int, int] | None = None  # I N: only every Nth prompt, from the Ith (0, …) on
    overwrite: bool = False  # replace an --out that is there


def main(args: Args) -> None:
    import jax

    from model import checkpoint, generate
    from model.tokenizer import ChatTokenizer
    from sharding import processes
    from sharding.mesh import decoding_sizes, make_mesh

    try:
        if args.share is not None and args.place() is not None:
            raise UserError("--share and --coordinator: give one of them")
        processes.start(args)
        sampling = generate.Sampling(
            args.n,
            args.temperature,
            args.top_p,
            args.top_k,
            args.min_p,
            args.max_new_tokens,
            args.seed,
            args.stop_strings,
        )
        _check_slots(args)
        config = checkpoint.load_config(args.checkpoint)
        identity = checkpoint.identity(args.checkpoint)
        tokenizer = ChatTokenizer.from_folder(args.checkpoint, config.eos_token_ids)
        mesh = make_mesh(*args.mesh or decoding_sizes(jax.device_count(), config))
    except (ValueError, UserError) as error:
        raise UserError(str(error)) from error

    limit = config.max_position_embeddings - args.max_new_tokens
    if limit < 1:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in the "
            f"model's context of {config.max_position_embeddings} tokens: lower it"
        )
    counts: Counter = Counter()
    order, longest = [], 1
    for where, row in read_prompts(args.prompts, counts):
        order.append(row["prompt_id"])
        length = len(_token_ids(tokenizer, row, where))
        longest = max(longest, length if length <= limit else 1)
    if not order:
        raise UserError(f"{args.prompts} holds no prompts: write one a line")
    read_lineage(args.prompts)
    manifest = Manifest(
        stage="sample",
        arguments={**dataclasses.asdict(sampling), "dtype": args.dtype},
        inputs={args.prompts: file_sha256(args.prompts)},
        identities={
            "model": identity,
            "tokenizer": tokenizer.identity,
            "chat_template": tokenizer.template_identity,
        },
    )
    share, shares = args.share or (0, 1)
    if not 0 <= share < shares:
        raise UserError(f"--share {share} {shares}: the first is a number from 0 to {shares - 1}")
    if not processes.agree(json.dumps(manifest.key())):
        raise UserError("the processes were given different prompts or checkpoints")
    # Of several processes on one mesh, only the first has an output.
    output = None
    if processes.is_first():
        output = Output.open(args.out, manifest, args.overwrite, (share, shares))
    if not processes.from_first(np.array(output is not None and output.finished)):
        mine = order[share::shares]
        results = _sample(args, sampling, config, tokenizer, mesh, output, mine, longest)
        if output is not None:
            output.finish(mine, counts if shares == 1 else Counter({"in": len(mine)}), results)
    if shares > 1:
        merge(args.out, manifest, shares, order, counts)


def _sample(
    args: Args, sampling, config, tokenizer, mesh, output: Output | None, mine, longest
) -> dict:
    """Write the answers to the prompts whose ids are `mine`; what it took. longest: tokens of the
    longest prompt that is answered; output None: another process writes."""
    import jax
    import jax.numpy as jnp

    from model import checkpoint, decoder, generate, placement
    from sharding import processes, table
    from sharding.mesh import tree_shardings

    rows: dict[str, Row] = {}  # prompts whose answers are in the making
    done = processes.from_first(np.array([output is not None and output.has(i) for i in mine]))
    todo = {prompt_id for prompt_id, is_done in zip(mine, done) if not is_done}

    def prompts() -> Iterator[tuple[str, list[int]]]:
        for where, row in read_prompts(args.prompts, Counter()):
            if row["prompt_id"] not in todo:
                continue
            row["prompt_token_ids"] = _token_ids(tokenizer, row, where)
            if len(row["prompt_token_ids"]) > longest:
                limit = config.max_position_embeddings - args.max_new_tokens
                if output is not None:
                    output.set_aside(row, f"prompt longer than {limit} tokens")
                progress.update()
                continue
            rows[row["prompt_id"]] = row
            yield row["prompt_id"], row["prompt_token_ids"]

    def check_together():  # so that all stop between the same two calls
        processes.all_check(check_stop, STOPPED_TOGETHER)

    progress = tqdm(
        total=len(mine),
        initial=int(done.sum()),
        unit=" prompts",
        desc="sample",
        disable=output is None,
    )
    with progress, jax.set_mesh(mesh), stop_signal() as check_stop:
        shardings = tree_shardings(mesh, decoder.logical_axes(config), decoder.abstract(config))
        try:
            params = checkpoint.load(args.checkpoint, shardings)[1]
        except checkpoint.UserError as error:
            raise UserError(str(error)) from error
        dtype = jnp.dtype(args.dtype)
        if dtype != jnp.float32:
            params = decoder.cast(params, dtype)
        a_slot = decoder.cache_bytes(config, longest + args.max_new_tokens, dtype)
        slots = min(processes.from_all(_slots(args, mesh, a_slot, args.n * len(mine))))
        progress.write(f"{slots} slots, a KV cache of at most {slots * a_slot / 1e9:.2f} GB")
        tell = table.table if args.shardings else table.summary
        length = longest + args.max_new_tokens
        progress.write(tell(mesh, placement.sampling(config, mesh, slots, length, dtype)))
        sampler = generate.Sampler(
            config, params, tokenizer.decode, sampling, slots, longest, dtype
        )
        del params
        start = time.monotonic()
        for prompt_id, answers in sampler.run(prompts(), check_together):
            row = rows.pop(prompt_id)
            row["responses"] = [dataclasses.asdict(answer) for answer in answers]
            if output is not None:
                output.write(row)
            rate = sampler.tokens_drawn / (time.monotonic() - start)
            progress.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            progress.update()
    seconds = time.monotonic() - start
    # Of this sitting alone: a run that was stopped before drew the rest then.
    sitting = {"tokens": sampler.tokens_drawn, "seconds": round(seconds, 1), "slots": slots}
    return {"last_sitting": sitting}


def _check_slots(args: Args) -> None:
    if args.slots is not None and args.slots < 1:
        raise UserError(f"--slots is {args.slots}: it must be at least 1")
    if args.slots is not None and args.cache_memory is not None:
        raise UserError("--slots and --cache-memory say the same thing twice: give one of them")
    if args.cache_memory is not None:
        parse_bytes(args.cache_memory, "--cache-memory")


def _slots(args: Args, mesh, a_slot: int, answers: int) -> int:
    """How many answers are made at a time, a multiple of the parts that the mesh cuts a batch in.
    a_slot: bytes of one of them; answers: how many there are in all."""
    from sharding.mesh import batch_shards, free_memory

    shards = batch_shards(mesh)
    slots, cpu = args.slots, mesh.devices.flat[0].platform == "cpu"
    if slots is None:
        if args.cache_memory is not None:
            memory = parse_bytes(args.cache_memory, "--cache-memory")
        else:
            memory = free_memory(mesh) * (0.25 if cpu else 0.8)
        slots = int(memory / (a_slot * shards)) * shards
        if slots < 1:
            raise UserError(
                f"the keys and values of {shards} answers take {a_slot * shards / 1e9:.2f} GB, and "
                f"{memory / 1e9:.2f} GB are for them: raise --cache-memory, lower --max-new-tokens "
                "or set longer prompts aside"
            )
        slots = min(slots, 64 if cpu else 256)
    return -(-max(1, min(slots, answers)) // shards) * shards


def _token_ids(tokenizer, row: Row, where: str) -> list[int]:

    try:
        return tokenizer.prompt_ids(messages_of(row, where))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
