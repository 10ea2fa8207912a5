"""Sample answers to prompts. checkpoint + prompts.jsonl → samples.jsonl

    python -m stages.sample --checkpoint C --prompts prompts.jsonl --out samples.jsonl --n 5

Each row gains `prompt_token_ids` and `responses`: n times {text, token_ids, end_token_id, logprob,
finish_reason}. Rows are written as their answers end; a run that is stopped goes on where it was.
A prompt that leaves no room for --max-new-tokens in the model's context is set aside.

The devices of several hosts work as one: --coordinator HOST:PORT --processes 4 and --process-id 0
to 3, the rest of the command the same. Process 0 writes. Machines without a network between them
take a slice of the prompts each: --slice 0/4, --slice 1/4, … (and the same --dtype); then

    python -m scripts.convert join samples.jsonl slice-0.jsonl slice-1.jsonl slice-2.jsonl …
"""

import dataclasses
import re
import sys
import time
from collections import Counter

import numpy as np
from etils import epy
from tqdm import tqdm

from sharding import processes
from sharding.errors import UserError, at, check_least
from stages.files.dtypes import Dtype, settle_dtype
from stages.files.output import Manifest, an_input, read_begun, read_lineage
from stages.files.paths import check_distinct
from stages.files.rows import Prompt, read
from stages.files.run import STOPPED_TOGETHER, run_main, stop_signal
from stages.files.together import open_output

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax

    from model import checkpoint, decoder, generate, kv_cache, slot_state
    from model import precision as precisions
    from sharding import chips, table
    from sharding import mesh as meshes


@dataclasses.dataclass
class Args(processes.Flags):
    checkpoint: str
    """The model that answers: a checkpoint folder."""
    prompts: str
    """The prompts.jsonl: rows with prompt (text) or messages."""
    out: str
    """The samples.jsonl to write."""
    n: int = 5
    """Answers per prompt."""
    temperature: float = 0.7
    """0: greedy."""
    top_p: float = 0.9
    """Keep the likeliest tokens that hold this share of the probability. 1: all tokens."""
    top_k: int = 0
    """Keep this many of the likeliest tokens. 0: all tokens."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the likeliest token's probability."""
    max_new_tokens: int = 256
    """An answer ends after this many tokens."""
    max_prompt_length: int | None = None
    """A prompt of more tokens is set aside, since the longest prompt sizes the cache of all slots.
    Default: what the model's context leaves."""
    stop_strings: tuple[str, ...] = ()
    """An answer also ends before any of these."""
    seed: int = 0
    """The seed of sampling. A draw depends on it, the prompt_id, the answer and the position."""
    slots: int | None = None
    """How many answers are sampled at the same time: more is faster, and takes more memory.
    Default: as many as --cache-memory holds, at most 64 on a CPU and 256 on accelerators."""
    cache_memory: str | None = None
    """Memory for the keys and values of all slots at full length, over all devices, e.g. 8GiB.
    Default: a quarter of a CPU machine's free memory, four fifths of the accelerators'."""
    dtype: Dtype = "auto"
    """The dtype of computation. auto: bfloat16 on accelerators and on CPUs with bfloat16
    instructions (amx_bf16 or avx512_bf16), float32 on other CPUs; a run that goes on keeps the
    dtype it began with."""
    mesh: tuple[int, int, int] | None = None
    """Devices along data, fsdp, tensor; -1: the rest. Default: along tensor as far as the key heads
    and the MLP divide, the rest along data. Along fsdp, each token would collect the weights."""
    shardings: bool = False
    """Print a table of what lies where: shapes, cuts, bytes per device."""
    slice: str | None = None
    """I/N: answer only every Nth prompt, beginning with number I (counted from 0)."""
    overwrite: bool = False
    """Replace an --out that exists."""


def main(args: Args) -> None:
    # ------------------------------------------------------------------ flags and model
    first, slices = parse_slice(args.slice)
    sampling = checked(args)
    check_distinct({"--checkpoint": args.checkpoint}, {"--out": args.out})
    processes.start(args)
    config, tokenizer = checkpoint.open_folder(args.checkpoint)
    sizes = args.mesh or meshes.decoding_sizes(len(meshes.list_devices()), config)
    mesh = meshes.make_mesh(*sizes)
    most = config.max_position_embeddings - args.max_new_tokens
    if most < 1:
        raise UserError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt in the "
            f"model's context of {config.max_position_embeddings} tokens: lower it"
        )
    most = min(most, args.max_prompt_length or most)

    # ------------------------------------------------------------------ prompts
    token_ids: dict[str, bytes] = {}  # int32, the least memory

    def tokenise(row: Prompt) -> None:
        with at(row.where):
            ids = tokenizer.prompt_ids(row.messages)
        token_ids[row.prompt_id] = np.array(ids, np.int32).tobytes()

    prompts = read(args.prompts, Prompt, each=tokenise)
    if not len(prompts):
        raise UserError(f"{args.prompts} holds no prompts: write one per line")
    read_lineage(args.prompts, prompts.sha256)
    lengths = [len(ids) // 4 for ids in token_ids.values()]
    longest = max((n for n in lengths if n <= most), default=1)

    # ------------------------------------------------------------------ output
    manifest = Manifest(
        stage="sample",
        arguments={
            **{name: x for name, x in dataclasses.asdict(sampling).items() if hasattr(args, name)},
            "dtype": args.dtype,
        }
        | ({"max_prompt_length": most} if args.max_prompt_length else {})
        | ({"slice": f"{first}/{slices}"} if args.slice else {}),
        inputs={"prompts": an_input(args.prompts, prompts.sha256)},
        identities={
            "model": checkpoint.identity(args.checkpoint),
            "tokenizer": tokenizer.identity,
            "chat_template": tokenizer.template_identity,
        },
    )
    args = dataclasses.replace(args, dtype=settle_dtype(manifest, read_begun(args.out)))
    mine = prompts.ids[first::slices]
    output, left = open_output(args.out, manifest, args.overwrite, mine)
    results = {}

    # ------------------------------------------------------------------ sample
    if left:
        answered = set(mine) - set(left)
        style = {"unit": " prompts", "desc": "sample", "disable": not processes.is_first()}
        bar = tqdm(total=len(mine), initial=len(mine) - len(left), **style)

        def ids_of(prompt_id: str) -> list[int]:
            return np.frombuffer(token_ids[prompt_id], np.int32).tolist()

        too_long = {prompt_id for prompt_id in mine if len(ids_of(prompt_id)) > most}
        for prompt_id in filter(too_long.__contains__, left):
            fields = prompts[prompt_id].fields | {"prompt_token_ids": ids_of(prompt_id)}
            output.set_aside(fields, f"prompt longer than {most} tokens")
            bar.update()
        to_answer = ((i, ids_of(i)) for i in mine if i not in too_long)

        with bar, jax.set_mesh(mesh), stop_signal() as check_stop:
            samplers = load_samplers(
                args, config, tokenizer, sampling, mesh, longest, len(mine), bar
            )
            start, tokens = time.monotonic(), 0
            check_together = processes.loop_check(check_stop, STOPPED_TOGETHER)
            runs = generate.run_side_by_side(samplers, to_answer, check_together, answered)
            for prompt_id, answers in runs:
                responses = [dataclasses.asdict(answer) for answer in answers]
                new = {"prompt_token_ids": ids_of(prompt_id), "responses": responses}
                output.write(prompts[prompt_id].fields | new)
                tokens = sum(sampler.tokens_drawn for sampler in samplers)
                rate = tokens / (time.monotonic() - start)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                bar.update()
        seconds, slots = round(time.monotonic() - start, 1), sum(s.slots for s in samplers)
        results["last_sitting"] = {"tokens": tokens, "seconds": seconds, "slots": slots}

    # ------------------------------------------------------------------ finish
    if not output.finished:
        counts = prompts.counts.copy()
        if args.slice:  # what scripts.convert join needs to put the rows in the prompts' order
            is_aside = {row["prompt_id"]: why is not None for row, why in output.rows()}
            results["set_aside"] = [n for n, i in enumerate(mine) if is_aside[i]]
            others = len(prompts) - len(mine)
            counts = counts - Counter({"in": others}) if first == 0 else Counter({"in": len(mine)})
        output.finish(mine, counts, results)


def checked(args: Args) -> "generate.Sampling":
    """What decides the draws. Raises UserError for a flag that makes no sense."""
    check_least(args, slots=1, max_prompt_length=1)
    if args.slots is not None and args.cache_memory is not None:
        raise UserError("--slots and --cache-memory both set the number of slots: give one of them")
    if args.cache_memory is not None:
        parse_bytes(args.cache_memory, "--cache-memory")
    names = [field.name for field in dataclasses.fields(generate.Sampling)]
    return generate.Sampling(**{name: x for name, x in vars(args).items() if name in names})


def parse_slice(text: str | None) -> tuple[int, int]:
    """(which, of how many) of a text such as 0/4. Raises UserError."""
    numbers = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    first, slices = map(int, numbers.groups()) if numbers else (0, 0)
    if first >= slices:
        raise UserError(f"--slice {text}: give I/N, where I is a number from 0 to N − 1")
    return first, slices


def load_samplers(args: Args, config, tokenizer, sampling, mesh, longest: int, prompts: int, bar):
    """The engines (generate.Sampler) that answer the prompts with the checkpoint's weights: one, or
    two with half the slots each in bfloat16 on a single CPU device, if it has enough slots: two
    keep the cores busier. longest: tokens of the longest prompt."""
    params = checkpoint.load(args.checkpoint, mesh)[1]
    precision = precisions.precision_of(args.dtype)
    params = decoder.stored_in(params, precision)
    unit = generate.cache_unit(mesh.devices.flat[0].platform)
    length = generate.round_up(longest + args.max_new_tokens, unit)
    slot_bytes = kv_cache.cache_bytes(config, length, precision.activations)
    if config.num_key_value_heads % mesh.shape["tensor"]:  # each device holds all heads
        slot_bytes *= mesh.shape["tensor"]
    slots = min(processes.from_all(count_slots(args, mesh, slot_bytes, args.n * prompts)))
    bar.write(f"{slots} slots, a KV cache of at most {slots * slot_bytes / 1e9:.2f} GB")
    tell = table.table if args.shardings else table.summary
    bar.write(tell(mesh, slot_state.arrays_held(config, mesh, slots, length, precision)))
    # Two threads would mix up the collectives of several devices; a few slots round differently.
    in_two = precision.rounds_operands and slots >= 2 * generate.FEWEST_IN_BF16
    count = 2 if in_two and mesh.size == 1 else 1
    samplers: list[generate.Sampler] = []
    for number in range(count):
        share = len(range(number, slots, count))
        params = samplers[0].params if samplers else params
        how = tokenizer.decode, sampling, share, longest, precision
        samplers.append(generate.Sampler(config, params, *how))
    return samplers


def count_slots(args: Args, mesh, slot_bytes: int, answers: int) -> int:
    """How many answers are sampled at the same time: a multiple of the number of parts into which
    the mesh cuts a batch. slot_bytes: keys and values of one answer; answers: how many in all."""
    shards = meshes.batch_shards(mesh)
    slots, on_cpu = args.slots, mesh.devices.flat[0].platform == "cpu"
    free = chips.free_memory(mesh)
    if slots is None:
        if args.cache_memory is not None:
            memory = parse_bytes(args.cache_memory, "--cache-memory")
        else:
            memory = free * (0.25 if on_cpu else 0.8)
        slots = int(memory / (slot_bytes * shards)) * shards
        if slots < 1:
            raise UserError(
                f"the keys and values of {shards} answers take {slot_bytes * shards / 1e9:.2f} GB, "
                f"and {memory / 1e9:.2f} GB are set apart for them: raise --cache-memory, or lower "
                "--max-new-tokens or --max-prompt-length"
            )
        slots = min(slots, 64 if on_cpu else 256)
    slots = -(-max(1, min(slots, answers)) // shards) * shards
    if args.slots is not None and slots * slot_bytes > free:
        raise UserError(
            f"the keys and values of {slots} answers take {slots * slot_bytes / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free: lower --slots, --max-new-tokens or --max-prompt-length"
        )
    return slots


def parse_bytes(text: str, flag: str) -> int:
    """The bytes that a text such as 8GiB, 500MB or 4096 names. Raises UserError."""
    prefixes = list(enumerate("KMGT", 1))
    units = {"": 1} | {f"{p}B": 1000**i for i, p in prefixes}
    units |= {f"{p}iB": 1024**i for i, p in prefixes}
    number = text.rstrip("KMGTiB")
    try:
        size = int(float(number) * units[text[len(number) :].strip()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"{flag} is {text!r}: give a size such as 8GiB or 500MB")
    return size


if __name__ == "__main__":
    sys.exit(run_main(main, Args, several=processes))
