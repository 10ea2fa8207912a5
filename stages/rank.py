"""Rank the answers of each prompt. samples.jsonl → ranked.jsonl

    python -m stages.rank --ranker llm-blender/PairRM --samples samples.jsonl --out ranked.jsonl
    python -m stages.rank --ranker reward.py:reward --samples samples.jsonl --out ranked.jsonl

The ranker is PairRM (its folder or hub id), or a reward function in a Python file (opening.py
has its signature). Each row gains `scores`, one per response, higher is better; from PairRM also
`comparisons`, the n×n matrix of logits ([i][j]: how far i beats j when i stands first; null where
the two were not compared), and `truncated`, which texts were cut to PairRM's length (llm-blender
does not tell); from a reward function `score_terms`, where it tells what its scores consist of. A
function that raises, or returns the wrong number of scores or one that is not finite, stops the
stage at that prompt; what was ranked before is kept.

Several processes share the work with --coordinator HOST:PORT --processes 4 and --process-id 0 to 3,
the rest of the command the same, on a file system that all of them see: each ranks every fourth row
on devices of its own, and process 0 puts the parts together.

The manifest's results, also printed: of all pairs of answers compared, how many are decided alike
in both orders (swap_consistency), tie (tie_rate), or had a text cut (truncation_rate), and how
scores go with length (score_length_correlation).
"""

import dataclasses
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from model.rankers.comparisons import Report
from model.rankers.opening import open_ranker
from model.rankers.pairwise import as_comparison
from model.rankers.ranking import Ranking, Request
from sharding.errors import UserError
from sharding.watch import Flags
from stages.files.output import Manifest, Output, read_lineage, read_manifest
from stages.files.paths import file_sha256
from stages.files.rows import field, messages_of, prompt_text, read_rows
from stages.files.run import run_main, stop_signal
from stages.files.shares import check_same, join, merge


@dataclasses.dataclass
class Args(Flags):
    ranker: str
    """A PairRM's folder or hub id, or FILE.py:FUNCTION, a reward function."""
    samples: str
    """The samples.jsonl to rank."""
    out: str
    """The ranked.jsonl to write."""
    comparisons: Literal["full", "bubble"] | None = None
    """PairRM: compare each answer with each other one, in both orders (full, the default), or only
    as many as it takes to find the best and the worst (bubble)."""
    aggregation: Literal["max_logits", "max_wins"] | None = None
    """PairRM, full: scores are mean logits, as llm-blender's (max_logits, the default), or how many
    comparisons were won (max_wins)."""
    backend: Literal["jax", "llm-blender"] | None = None
    """PairRM: our implementation (jax, the default) or llm-blender's own, on the host."""
    device: Literal["accelerator", "host"] | None = None
    """PairRM: computed on all accelerators that this process has (the default), or on the host."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """PairRM: of the computation; default float32."""
    overwrite: bool = False
    """Replace an --out that is there."""


# What an earlier ranking may have left in a row; the rest is carried through.
MADE = ("scores", "comparisons", "score_terms", "truncated")
PAIRRM = {
    "comparisons": "full",
    "aggregation": "max_logits",
    "backend": "jax",
    "device": "accelerator",
    "dtype": "float32",
}


def main(args: Args) -> None:
    pairwise = not args.ranker.rpartition(":")[0].endswith(".py")
    given = {name: getattr(args, name) for name in PAIRRM if getattr(args, name) is not None}
    if given and not pairwise:
        raise UserError(f"--{next(iter(given))} is for PairRM, and {args.ranker} is a function")
    options = PAIRRM | given if pairwise else {}
    if options.get("comparisons") == "bubble" and "aggregation" in given:
        raise UserError(
            "--aggregation is for --comparisons full: bubble finds best and worst alone"
        )
    if options.get("backend") == "llm-blender":
        for name in ("device", "dtype"):
            if name in given:
                raise UserError(
                    f"--{name} is for --backend jax: llm-blender computes in fp32 on CPU"
                )
    share, shares = join(args, options.get("device") == "host")
    counts: Counter = Counter()
    order = [row["prompt_id"] for _, row in _read(args.samples, counts)]
    try:
        ranker = open_ranker(args.ranker, **options)
    except UserError as error:
        raise UserError(str(error)) from error
    lineage = read_lineage(args.samples)
    manifest = Manifest(
        stage="rank",
        arguments={name: value for name, value in options.items() if name != "device"},
        inputs={args.samples: file_sha256(args.samples)},
        identities={**(lineage.identities if lineage else {}), "ranker": ranker.identity},
    )
    if shares > 1:
        check_same(manifest)
    results = partial(_results, args.ranker)
    output = Output.open(args.out, manifest, args.overwrite, (share, shares))
    if not output.finished:
        mine = order[share::shares]
        _rank(args, ranker, output, mine, pairwise)
        counts_here = counts if shares == 1 else Counter({"in": len(mine)})
        output.finish(mine, counts_here, results(output))
    if shares > 1:
        from sharding import processes

        processes.wait()
        if share == 0:
            merge(args.out, manifest, shares, order, counts, results)
        processes.wait()
    found = read_manifest(args.out).results
    shown = [f"{name} {x:.4g}" for name, x in found.items() if not isinstance(x, str)]
    if shown:
        print(", ".join(shown))


def _rank(args: Args, ranker, output: Output, mine: list[str], pairwise: bool) -> None:
    """Write the rankings of the rows whose prompt_ids are `mine`."""
    bar = tqdm(total=len(mine), initial=len(output), unit=" prompts", desc="rank")
    with bar, stop_signal() as check_stop:
        made = 0

        def done(count: int):
            nonlocal made
            made += count
            if pairwise:
                rate = made / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"{rate:.3g} comparisons/s")
            check_stop()

        try:
            for request, ranking in ranker.rank_all(
                _requests(args, output, set(mine), pairwise), done
            ):
                output.write(request.row | _fields(ranking))
                bar.update(len(output) - bar.n)
                check_stop()
        except UserError as error:
            raise UserError(str(error)) from error
        elapsed = bar.format_dict["elapsed"]
    if pairwise and made:
        print(f"{made} comparisons in {elapsed:.1f} s: {made / elapsed:.3g} a second")


def _results(ranker: str, output: Output) -> dict:
    """What the ranking shows of itself, for the manifest."""
    report = Report()
    for row, reason in output.rows():
        if reason is None:
            texts = [response["text"] for response in row["responses"]]
            cut = row.get("truncated")
            report.add(texts, Ranking(row["scores"], row.get("comparisons"), truncated=cut))
    # Its name for people; what decides the scores is the identity.
    name = Path(ranker).name if Path(ranker.partition(":")[0]).exists() else ranker
    return report.results() | {"ranker": name}


def _requests(args: Args, output: Output, mine: set[str], pairwise: bool):
    """What of `mine` is still to be ranked; what cannot be is set aside."""
    for where, row in _read(args.samples, Counter()):
        if row["prompt_id"] not in mine or output.has(row["prompt_id"]):
            continue
        row = {name: value for name, value in row.items() if name not in MADE}
        messages, responses = messages_of(row, where), row["responses"]
        if not responses:
            output.set_aside(row, "no responses")
            continue
        try:
            if pairwise:
                as_comparison(messages, [])
        except ValueError as error:
            output.set_aside(row, str(error))
            continue
        yield Request(
            where=where,
            prompt_id=row["prompt_id"],
            prompt=prompt_text(row, where),
            messages=messages,
            responses=[response["text"] for response in responses],
            finish_reasons=[response.get("finish_reason", "stop") for response in responses],
            row=row,
        )


def _fields(ranking: Ranking) -> dict:
    found = {
        "scores": ranking.scores,
        "comparisons": ranking.comparisons,
        "score_terms": ranking.terms,
        "truncated": ranking.truncated,
    }
    return {name: value for name, value in found.items() if value is not None}


def _read(path: str, counts: Counter):
    """(where, row) of each checked row; a prompt_id that comes twice is an error."""
    seen = set()
    for where, row in read_rows(path):
        prompt_id = field(row, "prompt_id", str, where)
        messages_of(row, where)
        for i, response in enumerate(field(row, "responses", list, where)):
            at = f"{where}, responses[{i}]"
            if not isinstance(response, dict):
                raise UserError(f"{at}: {type(response).__name__}, not an object with a text")
            field(response, "text", str, at)
        if prompt_id in seen:
            raise UserError(f"{where}: prompt_id {prompt_id!r} stood above: remove one of them")
        seen.add(prompt_id)
        counts["in"] += 1
        yield where, row


if __name__ == "__main__":
    sys.exit(run_main(main, Args))
