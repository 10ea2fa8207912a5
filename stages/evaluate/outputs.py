"""Answers to a benchmark's instructions, or the best of n, as AlpacaEval's model_outputs.json."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from model.rankers.opening import open_ranker
from model.rankers.ranking import Ranking, Request
from sharding.errors import UserError
from sharding.watch import Flags
from stages.evaluate.answers import conversation_key
from stages.evaluate.benchmarks import local_file, read_instructions
from stages.evaluate.judge import official_command
from stages.files.output import Manifest, Output, read_manifest
from stages.files.paths import file_sha256
from stages.files.rows import Row, messages_of, prompt_text, read_prompts, read_rows
from stages.files.run import Stopped, stop_signal


@dataclasses.dataclass
class Outputs(Flags):
    """A model's answers to a benchmark, exactly one an instruction; with --best-of 16 the one that
    a ranker finds best of 16.

    Beside NAME.json lie NAME.prompts.jsonl, NAME.samples.jsonl with all answers, made by
    stages.sample, and NAME.ranked.jsonl with their scores. Stopped, the same command goes on.

    Several processes sample together: the same command in each, with --coordinator HOST:PORT
    --processes 4 and --process-id 0 to 3, on a file system that all of them see. Process 0 does the
    rest.
    """

    checkpoint: str
    """The model that answers: a checkpoint folder."""
    out: str
    """The model_outputs.json to write: NAME.json."""
    benchmark: str = "alpaca_eval"
    """AlpacaEval's 805 from the hub ("alpaca_eval"), a folder or file of them, MT-Bench's
    question.jsonl (first turns), or any prompts.jsonl."""
    generator: str | None = None
    """The model's name in the file; default: the checkpoint folder's, with the n of best-of-n."""
    best_of: int = 1
    """Answers sampled to each instruction, of which --ranker's best is kept."""
    ranker: str | None = None
    """A PairRM's folder or hub id, or FILE.py:FUNCTION, a reward function."""
    comparisons: Literal["full", "bubble"] = "full"
    """PairRM: each answer against each other, n(n−1) comparisons and a score for each; or, an
    eighth of them at 16, who wins against the next, as llm-blender's get_best_of_n."""
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 2048
    """An answer longer than this is cut."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of sampling; bfloat16 on accelerators."""
    mesh: tuple[int, int, int] | None = None
    """Devices along data, fsdp, tensor; -1: the rest. Default: as stages.sample."""
    slots: int | None = None
    """Answers in the making at a time; default: as stages.sample."""
    overwrite: bool = False
    """Replace an --out that is there, and what lies beside it."""


def main(args: Outputs) -> None:
    _check(args)
    stem = args.out.removesuffix(".json")
    prompts, samples = f"{stem}.prompts.jsonl", f"{stem}.samples.jsonl"
    place = _place(args)
    first = place is None or place[2] == 0
    if first:
        write_prompts(args, prompts)
    # Of several processes none samples before process 0 does, which has written the prompts.
    run_stage("stages.sample", sample_arguments(args, prompts, samples, place))
    if not first:
        return
    rows = {row["prompt_id"]: row for _, row in read_rows(samples)}
    asked = [row for _, row in read_prompts(prompts, Counter())]
    _check_all_answered(args, asked, rows, samples)
    lineage, best, source = read_manifest(samples), {}, samples
    identities = dict(lineage.identities)
    if args.best_of > 1:
        source, identities["ranker"], best = rank(args, f"{stem}.ranked.jsonl", asked, rows)
    manifest = Manifest(
        stage="evaluate outputs",
        arguments={"generator": _generator(args), "best_of": args.best_of},
        inputs={source: file_sha256(source)},
        identities=identities,
    )
    output = Output.open(args.out, manifest, args.overwrite)
    if not output.finished:
        answers = [_answer(args, rows[row["prompt_id"]], best) for row in asked]
        ends = Counter(answer["finish_reason"] for answer in answers)
        characters = sum(len(answer["output"]) for answer in answers) / len(answers)
        output.finish_as(
            answers,
            {"in": len(asked), "out": len(answers)},
            {"finish_reasons": dict(ends), "mean_length": characters},
        )
        print(f"{characters:.0f} characters on average, {ends['stop']} ended by themselves")
    print("AlpacaEval's own judge (it asks OpenAI, and costs money):")
    print(f"  {official_command(args.out)}")


def _check(args: Outputs) -> None:
    if not args.out.endswith(".json"):
        raise UserError(f"--out {args.out}: give the name of a .json file")
    if args.best_of < 1:
        raise UserError(f"--best-of is {args.best_of}: it must be at least 1")
    if (args.best_of > 1) != (args.ranker is not None):
        raise UserError("--best-of 2 or more and --ranker go together")
    if args.ranker is None:
        return
    try:  # before hours of sampling; but nothing that takes an accelerator, which sampling needs
        if _is_function(args.ranker):
            open_ranker(args.ranker)
        else:
            from model.rankers.pairrm import open_folder

            open_folder(args.ranker)
    except ValueError as error:
        raise UserError(f"--ranker: {error}") from error


def _place(args: Outputs) -> tuple[str, int, int] | None:
    try:
        place = args.place()
    except ValueError as error:
        raise UserError(str(error)) from error
    if place == "auto":
        raise UserError("--coordinator auto: give HOST:PORT, --processes and --process-id")
    return place


def _is_function(ranker: str) -> bool:
    return ranker.rpartition(":")[0].endswith(".py") or ranker.endswith(".py")


def _generator(args: Outputs) -> str:
    name = args.generator or Path(args.checkpoint).name
    return name if args.generator or args.best_of == 1 else f"{name}-best-of-{args.best_of}"


# ------------------------------------------------------------------------------- sampling


def write_prompts(args: Outputs, path: str) -> None:
    """The benchmark's instructions as prompts.jsonl."""
    file = local_file(args.benchmark)
    counts: Counter = Counter()
    rows = read_instructions(file, counts)
    manifest = Manifest("evaluate outputs: prompts", {}, {file: file_sha256(file)}, {})
    output = Output.open(path, manifest, args.overwrite)
    if not output.finished:
        for row in rows:
            if not output.has(row["prompt_id"]):
                output.write(row)
        output.finish([row["prompt_id"] for row in rows], counts)


def sample_arguments(
    args: Outputs, prompts: str, samples: str, place: tuple[str, int, int] | None
) -> list[str]:
    argv = [
        "--checkpoint",
        args.checkpoint,
        "--prompts",
        prompts,
        "--out",
        samples,
        "--n",
        str(args.best_of),
        "--temperature",
        str(args.temperature),
        "--top-p",
        str(args.top_p),
        "--max-new-tokens",
        str(args.max_new_tokens),
        "--seed",
        str(args.seed),
        "--dtype",
        args.dtype,
    ]
    argv += [] if args.mesh is None else ["--mesh", *map(str, args.mesh)]
    argv += [] if args.slots is None else ["--slots", str(args.slots)]
    if place is not None:
        names = ("--coordinator", "--processes", "--process-id")
        argv += [str(x) for pair in zip(names, place) for x in pair]
    return argv + (["--overwrite"] if args.overwrite else [])


def run_stage(module: str, argv: list[str]) -> None:
    """Run a stage as its own process, so that it leaves no memory taken, and stop it with this one.
    Its messages are its own; its exit code becomes ours."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with stop_signal() as check_stop:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *argv], env=os.environ | {"PYTHONPATH": path}
        )
        told = False
        while child.poll() is None:
            try:
                check_stop()
            except Stopped:
                if not told:
                    child.send_signal(signal.SIGTERM)
                told = True
            try:
                child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
        check_stop()
    if child.returncode == 75:
        raise Stopped(f"{module} was stopped, its work is saved")
    if child.returncode == 2:
        raise UserError(f"{module} could not do its part: mend what it says above")
    if child.returncode:
        raise RuntimeError(f"{module} ended with exit code {child.returncode}: see above")


def _check_all_answered(args: Outputs, asked: list, rows: dict, samples: str) -> None:
    """Exactly one answer an instruction is what win rates are made of."""
    missing = [row["prompt_id"] for row in asked if row["prompt_id"] not in rows]
    short = [i for i, row in rows.items() if len(row["responses"]) != args.best_of]
    if missing or short or len(rows) != len(asked):
        raise UserError(
            f"{samples}: {len(missing)} of {len(asked)} instructions have no answer"
            f"{f', {len(short)} not {args.best_of}' if short else ''}: "
            f"{samples}.set_aside.jsonl says why (lower --max-new-tokens where they are too long)"
        )


# -------------------------------------------------------------------------------- best of n


def rank(
    args: Outputs, path: str, asked: list[Row], rows: dict[str, Row]
) -> tuple[str, str, dict[str, int]]:
    """(file with all answers and their scores, ranker's identity, prompt_id → the best one)."""
    kind = "full" if args.comparisons == "full" else "best"
    try:
        ranker = open_ranker(args.ranker, comparisons=kind)
    except UserError as error:
        raise UserError(str(error)) from error
    samples = path.replace(".ranked.jsonl", ".samples.jsonl")
    manifest = Manifest(
        stage="evaluate outputs: best of n",
        arguments={} if _is_function(args.ranker) else {"comparisons": args.comparisons},
        inputs={samples: file_sha256(samples)},
        identities={**read_manifest(samples).identities, "ranker": ranker.identity},
    )
    output = Output.open(path, manifest, args.overwrite)
    if not output.finished:
        requests = (
            _request(rows[row["prompt_id"]]) for row in asked if not output.has(row["prompt_id"])
        )
        bar = tqdm(total=len(asked), initial=len(output), unit=" prompts", desc="best of n")
        with bar, stop_signal() as check_stop:
            try:
                for request, ranking in ranker.rank_all(requests, lambda _: check_stop()):
                    output.write(request.row | _fields(ranking))
                    bar.update(len(output) - bar.n)
            except UserError as error:
                raise UserError(str(error)) from error
        output.finish([row["prompt_id"] for row in asked], Counter({"in": len(asked)}))
    best = {row["prompt_id"]: row["best"] for _, row in read_rows(path)}
    return path, ranker.identity, best


def _request(row: Row) -> Request:
    where = f"prompt_id {row['prompt_id']!r}"
    return Request(
        where=where,
        prompt_id=row["prompt_id"],
        prompt=prompt_text(row, where),
        messages=messages_of(row, where),
        responses=[response["text"] for response in row["responses"]],
        finish_reasons=[response["finish_reason"] for response in row["responses"]],
        row=row,
    )


def _fields(ranking: Ranking) -> dict:
    found = {
        "scores": ranking.scores,
        "comparisons": ranking.comparisons,
        "score_terms": ranking.terms,
        "truncated": ranking.truncated,
    }
    best = max(range(len(ranking.scores)), key=lambda i: (ranking.scores[i], -i))
    return {name: value for name, value in found.items() if value is not None} | {"best": best}


def _answer(args: Outputs, row: Row, best: dict[str, int]) -> dict:
    response = row["responses"][best.get(row["prompt_id"], 0)]
    messages = messages_of(row, row["prompt_id"])
    return {
        "instruction": conversation_key(messages),
        "output": response["text"],
        "generator": _generator(args),
        "dataset": row.get("dataset") or "prompts",
        "finish_reason": response["finish_reason"],
    }
