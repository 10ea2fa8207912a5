"""Compare two files of answers by a ranker. Two model_outputs.json or samples.jsonl → compare.json

    python -m stages.evaluate compare --outputs best.json --baseline model_outputs.json \\
        --ranker llm-blender/PairRM --out compare.json
"""

import dataclasses

import numpy as np
from etils import epy

from model.rankers.ranking import Ranking, Request
from sharding import processes
from stages import rank
from stages.evaluate import winrates
from stages.evaluate.answers import read_both
from stages.files.benchmarks import ModelOutput, read_difficulties
from stages.files.output import Manifest, an_input
from stages.files.paths import check_distinct
from stages.files.together import open_output

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    from model.rankers import comparisons, opening

# The entries of --out that the manifest's results leave out.
LONG = ("outputs", "baseline", "ranker", "generators", "per_instruction")


@dataclasses.dataclass
class Compare(processes.Flags):
    """How often a ranker prefers a model's answers to a baseline's.

    PairRM compares each pair in both orders; a reward function scores both answers. The JSON has
    wins, ties, losses, the win rate (a tie counts half) with its standard error and 95% bootstrap
    interval, mean lengths in characters, the length-controlled win rate, and each instruction's
    preference (1: the model won, 0.5: a tie), margin and lengths.
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
    """The response taken from each row of a samples.jsonl, counted from 0."""
    common_only: bool = False
    """Compare only the instructions that both files answer, instead of refusing other files."""
    difficulty: str | None = None
    """AlpacaEval's difficulty of each instruction (instruction_difficulty.csv, or a JSON of it),
    for the length-controlled win rate of AlpacaEval 2.0. Without it length alone is controlled."""
    seed: int = 0
    """The seed of the bootstrap."""
    overwrite: bool = False
    """Replace --out if it exists."""


def main(args: Compare) -> None:
    # ------------------------------------------------------------------------------ inputs
    check_distinct({"--ranker": rank.ranker_path(args.ranker)}, {"--out": args.out})
    rank.make_two_devices(args)
    processes.start(args)
    files = args.outputs, args.baseline
    pairs, generators, counts = read_both(files, args.response, args.common_only)
    difficulties = read_difficulties(args.difficulty, len(pairs)) if args.difficulty else None
    ranker = opening.open_ranker(args.ranker)

    # ------------------------------------------------------------------------------ output
    inputs = {name: getattr(args, name) for name in ("outputs", "baseline", "difficulty")}
    inputs = {role: an_input(path) for role, path in inputs.items() if path}
    manifest = Manifest(
        stage="evaluate compare",
        arguments={"response": args.response, "common_only": args.common_only, "seed": args.seed},
        inputs=inputs,
        identities={
            "outputs": inputs["outputs"]["sha256"],
            "baseline": inputs["baseline"]["sha256"],
            "ranker": ranker.identity,
        },
    )
    pairs_by_id = {ours.key: (ours, theirs) for ours, theirs in pairs}
    output, left = open_output(args.out, manifest, args.overwrite, list(pairs_by_id))

    # ------------------------------------------------------------------------------ rank
    if left:
        requests = (_request(*pairs_by_id[key]) for key in left)
        done = len(pairs) - len(left), len(pairs)
        rank.rank_all(ranker, requests, output, done, "compare", _judged)

    # ------------------------------------------------------------------------------ finish
    if not output.finished:
        rows = {row["prompt_id"]: row for row, _ in output.rows()}
        content = _summary(args, [rows[key] for key in pairs_by_id], generators, difficulties)
        output.finish_as(content, counts, {k: x for k, x in content.items() if k not in LONG})
        _show(content)


def _request(ours: ModelOutput, baseline: ModelOutput) -> Request:
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
    """What a row gains: {scores, comparisons, preference: 1 ours, 0.5 a tie, 0 the baseline's}."""
    a, b = ranking.scores
    judged = {"scores": ranking.scores, "preference": 0.5 if a == b else float(a > b)}
    return judged | ({"comparisons": ranking.comparisons} if ranking.comparisons else {})


def _summary(
    args: Compare,
    rows: list[dict],
    generators: list[str],
    difficulties: np.ndarray | None,
) -> dict:
    """The content of --out, made of the judged rows."""
    preferences = np.array([row["preference"] for row in rows])
    lengths = np.array([row["lengths"] for row in rows])
    controlled = winrates.length_controlled(preferences, *lengths.T, difficulties)
    report = comparisons.Report()
    for row in rows:
        report.add(row["texts"], Ranking(row["scores"], row.get("comparisons")))
    measured = {name: value for name, value in report.results().items() if name != "pairs"}
    return {
        "outputs": args.outputs,
        "baseline": args.baseline,
        "ranker": args.ranker,
        "generators": generators,
        **dataclasses.asdict(winrates.summary(preferences, args.seed)),
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


def _show(content: dict) -> None:
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
