"""Answers to a benchmark's instructions, or the best of n, as AlpacaEval's model_outputs.json.

checkpoint + benchmark → NAME.json, and beside it NAME.prompts.jsonl, NAME.samples.jsonl and, for
the best of n, NAME.ranked.jsonl

    python -m stages.evaluate outputs --checkpoint C --out model_outputs.json
    python -m stages.evaluate outputs --checkpoint C --benchmark alpaca_eval --out best.json \\
        --best-of 16 --ranker llm-blender/PairRM
"""

import dataclasses
import gc
from collections import Counter
from pathlib import Path
from typing import Literal

from etils import epy

from sharding import processes
from sharding.errors import UserError, check_least
from stages import rank, sample
from stages.evaluate.judge import official_command
from stages.files.benchmarks import conversation_key, local_file, read_instructions
from stages.files.dtypes import Dtype
from stages.files.output import Manifest, Output, an_input, check_before, read_manifest
from stages.files.paths import check_distinct
from stages.files.rows import Prompt, Ranked, RowFile, Sample, read

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    from model.rankers import opening
    from stages.files import formats


@dataclasses.dataclass
class Outputs(processes.Flags):
    """A model's answers to a benchmark, exactly one per instruction. With --best-of 16 it is the
    one that a ranker finds best among 16.

    stages.sample writes all answers to NAME.samples.jsonl, and stages.rank their scores to
    NAME.ranked.jsonl. A stopped run goes on by the same command.

    Several processes compute on one mesh: the same command in each process, with --coordinator
    HOST:PORT --processes 4 and --process-id 0 to 3 (or --coordinator auto), on a file system that
    all of them see. Process 0 writes.
    """

    checkpoint: str
    """The model that answers: a checkpoint folder."""
    out: str
    """The model_outputs.json to write: NAME.json."""
    benchmark: str = "alpaca_eval"
    """AlpacaEval's 805 instructions from the hub ("alpaca_eval"), a folder or file of them,
    MT-Bench's question.jsonl (first turns), or any prompts.jsonl."""
    generator: str | None = None
    """The model's name in the file. Default: the checkpoint folder's name, with the n of
    best-of-n."""
    best_of: int = 1
    """Answers sampled per instruction; --ranker chooses the best of them."""
    ranker: str | None = None
    """A PairRM's folder or hub id, or FILE.py:FUNCTION, a reward function."""
    comparisons: Literal["full", "bubble"] = "full"
    """PairRM: compare each answer with each other one, n(n−1) comparisons and a score for each
    answer (full); or only the best so far with the next, an eighth of the comparisons at n = 16
    (bubble), as llm-blender's get_best_of_n does."""
    temperature: float = 0.7
    """0: greedy."""
    top_p: float = 0.9
    """Keep the likeliest tokens that hold this share of the probability. 1: all tokens."""
    max_new_tokens: int = 2048
    """An answer ends after this many tokens."""
    seed: int = 0
    """The seed of sampling."""
    dtype: Dtype = "auto"
    """The dtype of computation in sampling. auto: as in stages.sample; a run that goes on keeps the
    dtype it began with."""
    mesh: tuple[int, int, int] | None = None
    """Devices along data, fsdp, tensor; -1: the rest. Default: as in stages.sample."""
    slots: int | None = None
    """Answers in the making at a time. Default: as in stages.sample."""
    overwrite: bool = False
    """Replace --out, and the files beside it, if they exist."""


def main(args: Outputs) -> None:
    # -------------------------------------------------------------------------- refusals
    _check(args)
    place = {name: getattr(args, name) for name in ("coordinator", "processes", "process_id")}
    processes.start(args)
    if args.ranker is not None:
        opening.open_ranker(args.ranker)  # refuses before hours of sampling; loads no weights
    stem = args.out.removesuffix(".json")
    prompts, samples, ranked = (f"{stem}.{x}.jsonl" for x in ("prompts", "samples", "ranked"))
    written = {"prompts": prompts, "samples": samples, "ranked": ranked}
    check_distinct(
        {"--checkpoint": args.checkpoint, "--benchmark": args.benchmark},
        {"--out": args.out} | {f"{name} beside --out": path for name, path in written.items()},
    )

    if processes.is_first():  # before hours of work; the other files are opened before theirs
        check_before(args.out, STAGE, final_arguments(args), args.overwrite)
        if args.best_of > 1:
            check_before(ranked, "rank", {}, args.overwrite)

    # -------------------------------------------------------------------------- prompts
    if processes.is_first():
        write_prompts(args, prompts)
    processes.wait()

    # -------------------------------------------------------------------------- sample
    sample.main(
        sample.Args(
            checkpoint=args.checkpoint,
            prompts=prompts,
            out=samples,
            n=args.best_of,
            temperature=args.temperature,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
            seed=args.seed,
            slots=args.slots,
            dtype=args.dtype,
            mesh=args.mesh,
            overwrite=args.overwrite,
            **place,
        )
    )
    processes.wait()
    gc.collect()  # frees the model, which cycles may hold, before the ranker needs the memory
    answered = read(samples, Sample)
    check_all_answered(args, prompts, answered)

    # -------------------------------------------------------------------------- rank
    if args.best_of > 1:
        is_function = not rank.is_pairwise(args.ranker)
        comparisons = None if is_function else BEST_OF_N[args.comparisons]
        rank.main(
            rank.Args(
                ranker=args.ranker,
                samples=samples,
                out=ranked,
                comparisons=comparisons,
                overwrite=args.overwrite,
                **place,
            )
        )
        processes.wait()
        answered = read(ranked, Ranked)
        check_all_answered(args, prompts, answered)

    # -------------------------------------------------------------------------- finish
    if processes.is_first():
        write_outputs(args, answered)


STAGE = "evaluate outputs"
# How a ranker finds the best: by all scores, or in a knock-out that scores only the best.
BEST_OF_N = {"full": "full", "bubble": "best"}


def _check(args: Outputs) -> None:
    if not args.out.endswith(".json"):
        raise UserError(f"--out {args.out}: give the name of a .json file")
    check_least(args, best_of=1)
    if (args.best_of > 1) != (args.ranker is not None):
        raise UserError("--best-of 2 or more and --ranker go together")


def write_prompts(args: Outputs, path: str) -> None:
    """Write the benchmark's instructions as prompts.jsonl."""
    file = local_file(args.benchmark)
    counts: Counter = Counter()
    rows = read_instructions(file, counts)
    manifest = Manifest("evaluate outputs: prompts", {}, {"benchmark": an_input(file)}, {})
    formats.write_rows(path, manifest, ((row, None) for row in rows), counts, args.overwrite)


def check_all_answered(args: Outputs, prompts: str, answered: RowFile[Sample]) -> None:
    """Win rates need exactly --best-of answers to every instruction. Raises UserError."""
    asked, answers = read(prompts, Prompt).ids, set(answered.ids)
    missing = [prompt_id for prompt_id in asked if prompt_id not in answers]
    short = [row.prompt_id for row in answered if len(row.responses) != args.best_of]
    if missing or short or len(answers) != len(asked):
        others = f", and {len(short)} have not {args.best_of}" if short else ""
        raise UserError(
            f"{answered.path}: {len(missing)} of {len(asked)} instructions have no answer{others}: "
            f"{answered.path}.set_aside.jsonl says why (where they are too long, lower "
            "--max-new-tokens)"
        )


def final_arguments(args: Outputs) -> dict:
    """The arguments in the manifest of model_outputs.json."""
    generator = args.generator or Path(args.checkpoint).name
    if args.generator is None and args.best_of > 1:
        generator += f"-best-of-{args.best_of}"
    return {"generator": generator, "best_of": args.best_of}


def write_outputs(args: Outputs, answered: RowFile[Sample]) -> None:
    """Write model_outputs.json: to each instruction its only answer, or the best-scored one."""
    arguments = final_arguments(args)
    generator = arguments["generator"]
    role = "samples" if args.best_of == 1 else "ranked"
    manifest = Manifest(
        stage=STAGE,
        arguments=arguments,
        inputs={role: an_input(answered.path, answered.sha256)},
        identities=read_manifest(answered.path).identities,
    )
    output = Output.open(args.out, manifest, args.overwrite)
    if not output.finished:
        rows = []
        for row in answered:
            scores = row.scores if isinstance(row, Ranked) else [0.0]
            best = row.responses[scores.index(max(scores))]
            answer = {
                "instruction": conversation_key(row.messages),
                "output": best.text,
                "generator": generator,
                "dataset": row.fields.get("dataset") or "prompts",
                "finish_reason": best.finish_reason,
            }
            rows.append(answer | ({"messages": row.messages} if len(row.messages) > 1 else {}))
        ends = Counter(row["finish_reason"] for row in rows)
        characters = sum(len(row["output"]) for row in rows) / len(rows)
        results = {"finish_reasons": dict(ends), "mean_length": characters}
        output.finish_as(rows, {"in": len(rows), "out": len(rows)}, results)
        print(f"{characters:.0f} characters on average, {ends['stop']} ended by themselves")
    print("AlpacaEval's own judge (it asks OpenAI, and costs money):")
    print(f"  {official_command(args.out)}")
