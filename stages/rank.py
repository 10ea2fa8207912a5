"""Rank the answers of each prompt. samples.jsonl → ranked.jsonl

    python -m stages.rank --ranker llm-blender/PairRM --samples samples.jsonl --out ranked.jsonl
    python -m stages.rank --ranker reward.py:reward --samples samples.jsonl --out ranked.jsonl

The ranker is PairRM (its folder or hub id), or a reward function in a Python file, whose signature
model/rankers/functions.py describes. Each row gains

    scores        one per response, higher is better
    comparisons   PairRM: the n×n logits; [i][j] is how far i beats j when i stands first, null
                  where the two were not compared
    truncated     PairRM: which texts were cut to its length (llm-blender does not tell)
    score_terms   a reward function that tells its terms: their values

A function that raises, or returns the wrong number of scores or one that is not finite, stops the
stage at that prompt; what was ranked before is kept.

PairRM computes on all devices of this process, or of several: --coordinator HOST:PORT --processes 4
and --process-id 0 to 3, the rest of the command the same, on a file system that all of them see.
Process 0 writes, and alone calls a reward function.

The manifest's results are also printed. They say how many pairs of answers were compared, and the
share of them that both orders decide alike (swap_consistency), that tie (tie_rate), and that lost
text to PairRM's length (truncation_rate); and how scores go with length (score_length_correlation).
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from etils import epy
from tqdm import tqdm

from model.rankers.comparisons import Report
from model.rankers.opening import open_ranker
from model.rankers.pairwise import as_comparison
from model.rankers.ranking import Ranking, Request
from sharding import processes
from sharding.errors import UserError
from stages.files.output import Manifest, Output, an_input, read_lineage
from stages.files.paths import check_distinct
from stages.files.rows import RowFile, Sample, read
from stages.files.run import STOPPED_TOGETHER, run_main, stop_signal
from stages.files.together import Elsewhere, open_output

with epy.lazy_imports():  # loaded at its first use, so that --help answers at once
    import jax


@dataclasses.dataclass
class Args(processes.Flags):
    ranker: str
    """A PairRM's folder or hub id, or FILE.py:FUNCTION, a reward function."""
    samples: str
    """The samples.jsonl to rank."""
    out: str
    """The ranked.jsonl to write."""
    comparisons: Literal["full", "bubble", "best"] | None = None
    """PairRM: compare each answer with each other one, in both orders (full, the default), or only
    as many as it takes to find the best and the worst (bubble), or the best alone (best)."""
    aggregation: Literal["max_logits", "max_wins"] | None = None
    """PairRM, full: scores are mean logits, as llm-blender's (max_logits, the default), or numbers
    of comparisons won (max_wins)."""
    backend: Literal["jax", "llm-blender"] | None = None
    """PairRM: our implementation (jax, the default) or llm-blender's own, on the host."""
    device: Literal["accelerator", "host"] | None = None
    """PairRM: computed on all accelerators (the default), or on the host."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """PairRM: the dtype of computation (default: float32). On CPUs that multiply bfloat16 in
    hardware, bfloat16 takes less than half the time."""
    overwrite: bool = False
    """Replace an --out that exists."""


PAIRRM_DEFAULTS = {
    "comparisons": "full",
    "aggregation": "max_logits",
    "backend": "jax",
    "device": "accelerator",
    "dtype": "float32",
}
# Fields that an earlier ranking may have left in a row; all others are carried through.
MADE = ("scores", "comparisons", "score_terms", "truncated")


def main(args: Args) -> None:
    # ------------------------------------------------------------------ flags, input, ranker
    pairwise = is_pairwise(args.ranker)
    options = ranker_options(args, pairwise)
    check_distinct({"--ranker": ranker_path(args.ranker)}, {"--out": args.out})
    make_two_devices(args)
    if options.pop("device", None) == "host":
        jax.config.update("jax_platforms", "cpu")  # before the first device is asked for
    processes.start(args)
    samples = read(args.samples, Sample)
    ranker = open_ranker(args.ranker, **options)

    # ------------------------------------------------------------------ output
    lineage = read_lineage(args.samples, samples.sha256)
    manifest = Manifest(
        stage="rank",
        arguments=options,
        inputs={"samples": an_input(args.samples, samples.sha256)},
        identities={**(lineage.identities if lineage else {}), "ranker": ranker.identity},
    )
    output, left = open_output(args.out, manifest, args.overwrite, samples.ids)

    # ------------------------------------------------------------------ rank
    if left:
        requests = requests_of(samples, left, output, pairwise)
        unit = "comparisons" if pairwise else None
        done = len(samples) - len(left), len(samples)
        rank_all(ranker, requests, output, done, "rank", ranked_fields, unit)

    # ------------------------------------------------------------------ finish
    if not output.finished:
        output.finish(samples.ids, samples.counts, results_of(args, output))
    if processes.is_first():
        results = output.manifest.results
        numbers = [f"{name} {x:.4g}" for name, x in results.items() if not isinstance(x, str)]
        print(", ".join(numbers))


def make_two_devices(args) -> None:
    """Have JAX split the CPU into two devices for PairRM, which computes the attention of a batch
    on one core. Two and no more, since each holds a copy of the weights. Nothing is done where JAX
    is loaded already, or several processes compute. args: --ranker, and processes.Flags."""
    flags = os.environ.get("XLA_FLAGS", "")
    can = "jax" not in sys.modules and "device_count" not in flags and (os.cpu_count() or 1) > 1
    if can and is_pairwise(args.ranker) and args.place() is None:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2"


def is_pairwise(ranker: str) -> bool:
    """Whether --ranker names a model that compares answers, not FILE.py:FUNCTION."""
    return not ranker_path(ranker).endswith(".py")


def ranker_path(ranker: str) -> str:
    """The file or folder that --ranker names, or a hub id."""
    file = ranker.rpartition(":")[0]
    return file if file.endswith(".py") else ranker


def ranker_options(args: Args, pairwise: bool) -> dict:
    """The arguments of open_ranker beside the name: PairRM's settings. Raises UserError."""
    chosen = {name: value for name in PAIRRM_DEFAULTS if (value := getattr(args, name)) is not None}
    if chosen and not pairwise:
        raise UserError(f"--{next(iter(chosen))} is for PairRM, and {args.ranker} is a function")
    if args.comparisons not in (None, "full") and args.aggregation is not None:
        raise UserError(
            f"--aggregation is for --comparisons full: {args.comparisons} makes too few comparisons"
        )
    for name in ("device", "dtype"):
        if args.backend == "llm-blender" and name in chosen:
            raise UserError(
                f"--{name} is for --backend jax: llm-blender computes in float32 on CPU"
            )
    return PAIRRM_DEFAULTS | chosen if pairwise else {}


def requests_of(
    samples: RowFile[Sample], left: list[str], output: Output | Elsewhere, pairwise: bool
) -> Iterator[Request]:
    """The requests of the rows that are not ranked yet; for a pairwise ranker also of those that
    are (Request.is_ranked says why). A row that cannot be ranked is set aside."""
    waiting = set(left)
    for prompt_id in samples.ids if pairwise else left:
        row, is_ranked = samples[prompt_id], prompt_id not in waiting
        for name in MADE:
            row.fields.pop(name, None)
        reason = "" if row.responses else "no responses"
        try:
            if pairwise:
                as_comparison(row.messages, [])
        except ValueError as error:
            reason = reason or str(error)
        if not reason:
            yield dataclasses.replace(request_of(row), is_ranked=is_ranked)
        elif not is_ranked:
            output.set_aside(row.fields, reason)


def request_of(row: Sample) -> Request:
    """The row as a ranker's request."""
    return Request(
        where=row.where,
        prompt_id=row.prompt_id,
        prompt=row.prompt,
        messages=row.messages,
        responses=row.texts,
        finish_reasons=[response.finish_reason for response in row.responses],
        row=row.fields,
    )


def rank_all(
    ranker,
    requests: Iterable[Request],
    output: Output | Elsewhere,
    done: tuple[int, int],
    title: str,
    fields: Callable[[Ranking], dict],
    unit: str | None = None,
) -> None:
    """Write request.row | fields(ranking) of every request as soon as it is ranked; a signal stops
    the loop between two requests. A ranker that does not compute on the mesh runs in process 0,
    and the others wait.

    done: (rows that are ranked already, rows in all); unit: what the ranker counts, shown per
    second.
    """
    made = 0
    bar = tqdm(initial=done[0], total=done[1], unit=" prompts", desc=title)
    bar.disable |= not processes.is_first()

    def rank(check_stop: Callable[[], None]) -> None:
        def count(number: int) -> None:
            nonlocal made
            made += number
            if unit is not None:
                rate = made / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"{rate:.3g} {unit}/s")
            check_stop()

        for request, ranking in ranker.rank_all(requests, count):
            output.write(request.row | fields(ranking))
            bar.update()

    with bar, stop_signal() as check_stop:
        if ranker.on_mesh:
            rank(processes.loop_check(check_stop, STOPPED_TOGETHER))
        else:
            alone = partial(rank, check_stop) if processes.is_first() else lambda: None
            processes.all_check(alone, STOPPED_TOGETHER)
        seconds = bar.format_dict["elapsed"]
    if unit is not None and made:
        print(f"{made} {unit} in {seconds:.1f} s: {made / seconds:.3g} per second")


def ranked_fields(ranking: Ranking) -> dict:
    """The fields of a row that a ranking makes."""
    fields = {
        "scores": ranking.scores,
        "comparisons": ranking.comparisons,
        "score_terms": ranking.terms,
        "truncated": ranking.truncated,
    }
    return {name: value for name, value in fields.items() if value is not None}


def results_of(args: Args, output: Output) -> dict:
    """The manifest's results: figures over all rankings, and the ranker's name."""
    report = Report()
    for row, reason in output.rows():
        if reason is None:
            texts = [response["text"] for response in row["responses"]]
            matrix, truncated = row.get("comparisons"), row.get("truncated")
            report.add(texts, Ranking(row["scores"], matrix, truncated=truncated))
    # The name is for people to read; the manifest's identity of the ranker decides.
    is_local = Path(args.ranker.partition(":")[0]).exists()
    return report.results() | {"ranker": Path(args.ranker).name if is_local else args.ranker}


if __name__ == "__main__":
    sys.exit(run_main(main, Args, several=processes))
