"""Two files of answers to the same instructions, judged in pairs by a ranker."""

import dataclasses
from collections import Counter

import numpy as np
from tqdm import tqdm

from model.rankers.comparisons import Report
from model.rankers.opening import open_ranker
from model.rankers.ranking import Ranking, Request
from sharding.errors import UserError
from sharding.watch import Flags
from stages.evaluate import difficulty, winrates
from stages.evaluate.answers import Answer, align, generator_of, read_answers
from stages.files.output import Manifest, Output
from stages.files.paths import file_sha256
from stages.files.rows import Row
from stages.files.run import stop_signal
from stages.files.shares import check_same, join, merge_as

# What of --out the manifest's results leave out.
LONG = ("outputs", "baseline", "ranker", "generators", "per_instruction")


@dataclasses.dataclass
class Compare(Flags):
    """How often a model's answers beat a baseline's, as a ranker sees it.

    PairRM compares each pair in both orders; a reward function scores both. The JSON has wins,
    ties, losses, the win rate (ties half) with its standard error and 95% bootstrap interval, mean
    lengths in characters, the length-controlled win rate, and each instruction's preference (1: the
    model won, 0.5: a tie), margin and lengths. Of several processes each judges a part, and process
    0 puts them together.
    """

    outputs: str
    """The model's answers: a model_outputs.json or samples.jsonl."""
    baseline: str
    """The baseline's answers, in either form."""
    ranker: str
    """A PairRM's folder or hub id, or FILE.py:FUNCTION, a reward function."""
    out: str
    """The JSON file to write."""
    response: int = 0
    """Which response of a samples.jsonl's rows is taken, counted from 0."""
    common_only: bool = False
    """Compare the instructions that both answer, where others are answered in one file alone."""
    difficulty: str | None = None
    """AlpacaEval's difficulty of each instruction (instruction_difficulty.csv, or a JSON of it),
    for the length-controlled win rate of AlpacaEval 2.0; without it, length alone is controlled."""
    seed: int = 0
    """Of the bootstrap."""
    overwrite: bool = False
    """Replace an --out that is there."""


def main(args: Compare) -> None:
    share, shares = join(args)
    files = (args.outputs, args.baseline)
    ours, baseline = (read_answers(path, args.response) for path in files)
    counts: Counter = Counter()
    pairs = align(ours, baseline, files, args.common_only, counts)
    difficulties = difficulty.read(args.difficulty, len(pairs)) if args.difficulty else None
    try:
        ranker = open_ranker(args.ranker)
    except UserError as error:
        raise UserError(str(error)) from error
    inputs = [*files, *([args.difficulty] if args.difficulty else [])]
    manifest = Manifest(
        stage="evaluate compare",
        arguments={"response": args.response, "common_only": args.common_only, "seed": args.seed},
        inputs={path: file_sha256(path) for path in inputs},
        identities={
            "outputs": file_sha256(args.outputs),
            "baseline": file_sha256(args.baseline),
            "ranker": ranker.identity,
        },
    )
    if shares > 1:
        check_same(manifest)

    def finish(output: Output) -> None:
        rows = {row["prompt_id"]: row for row, _ in output.rows()}
        generators = [generator_of(ours, files[0]), generator_of(baseline, files[1])]
        content = _summary(args, [rows[a.key] for a, _ in pairs], generators, difficulties)
        output.finish_as(content, counts, {k: x for k, x in content.items() if k not in LONG})
        show(content)

    output = Output.open(args.out, manifest, args.overwrite, (share, shares))
    if not output.finished:
        mine = pairs[share::shares]
        rank(ranker, mine, output)
        if shares == 1:
            finish(output)
        else:
            output.finish([a.key for a, _ in mine], Counter({"in": len(mine)}))
    if shares > 1:
        from sharding import processes

        processes.wait()
        if share == 0:
            merge_as(args.out, manifest, shares, finish)
        processes.wait()


def _summary(args: Compare, rows: list[Row], generators: list[str], difficulties) -> dict:
    """What --out holds, of the judged rows."""
    preferences = np.array([row["preference"] for row in rows])
    lengths = np.array([row["lengths"] for row in rows])
    found = winrates.summary(preferences, args.seed)
    controlled = winrates.length_controlled(preferences, *lengths.T, difficulties)
    report = Report()
    for row in rows:
        report.add(row["texts"], Ranking(row["scores"], row.get("comparisons")))
    measured = {name: value for name, value in report.results().items() if name != "pairs"}
    return {
        "outputs": args.outputs,
        "baseline": args.baseline,
        "ranker": args.ranker,
        "generators": generators,
        **dataclasses.asdict(found),
        "length_controlled_win_rate": controlled.win_rate,
        "why": controlled.why,
        "length_control": "minimal" if difficulties is None else "with difficulty",
        "mean_length": lengths.mean(axis=0).tolist(),
        **measured,
        "per_instruction": [
            {
                "instruction": row["prompt_id"],
                "preference": row["preference"],
                "margin": row["scores"][0] - row["scores"][1],
                "lengths": row["lengths"],
            }
            for row in rows
        ],
    }


def rank(ranker, pairs: list[tuple[Answer, Answer]], output: Output) -> None:
    """Write a row for each pair: {prompt_id, texts, lengths, scores, comparisons, preference}."""
    requests = (_request(a, b) for a, b in pairs if not output.has(a.key))
    bar = tqdm(total=len(pairs), initial=len(output), unit=" pairs", desc="compare")
    with bar, stop_signal() as check_stop:
        try:
            for request, ranking in ranker.rank_all(requests, lambda _: check_stop()):
                output.write(request.row | _judged(ranking))
                bar.update(len(output) - bar.n)
        except UserError as error:
            raise UserError(str(error)) from error


def _request(ours: Answer, baseline: Answer) -> Request:
    texts = [ours.text, baseline.text]
    return Request(
        where=ours.where,
        prompt_id=ours.key,
        prompt=ours.prompt,
        messages=ours.messages,
        responses=texts,
        finish_reasons=[ours.finish_reason, baseline.finish_reason],
        row={"prompt_id": ours.key, "texts": texts, "lengths": [len(text) for text in texts]},
    )


def _judged(ranking: Ranking) -> dict:
    a, b = ranking.scores
    judged = {"scores": ranking.scores, "preference": 0.5 if a == b else float(a > b)}
    return judged | ({"comparisons": ranking.comparisons} if ranking.comparisons else {})


def show(content: dict) -> None:
    low, high = content["interval"]
    error, length = content["standard_error"], content["mean_length"]
    error = "" if error is None else f" ± {error:.2%}"
    print(
        f"{content['wins']} wins, {content['ties']} ties, {content['losses']} losses: win rate "
        f"{content['win_rate']:.2%}{error} [{low:.1%}, {high:.1%}]; characters {length[0]:.0f} "
        f"against {length[1]:.0f}"
    )
    if content["length_controlled_win_rate"] is None:
        print(f"no length-controlled win rate: {content['why']}")
    else:
        print(f"length-controlled win rate {content['length_controlled_win_rate']:.2%}")
