"""The leaderboard's figures of a judge's annotations. annotations.json → score.json

    python -m stages.evaluate score --annotations annotations.json --out score.json \\
        --difficulty instruction_difficulty.csv --gamed df_gamed.csv
"""

import dataclasses

import numpy as np

from sharding.errors import UserError
from stages.evaluate import winrates
from stages.files.benchmarks import read_annotations, read_difficulties, read_gamed
from stages.files.output import Manifest, Output, an_input


@dataclasses.dataclass
class Score:
    """AlpacaEval's figures of a file of annotations, in percent as on its leaderboard.

    Win rate, its standard error, discrete win rate, average length (characters, truncated) and
    length-controlled win rate. A preference lies between 1 (the reference won) and 2 (the model
    won); rows without one are left out and counted.
    """

    annotations: str
    """The annotations.json, as alpaca_eval or `judge` writes it."""
    out: str
    """The JSON file to write."""
    difficulty: str | None = None
    """instruction_difficulty.csv (or a JSON of it) from the hub's tatsu-lab/alpaca_eval, which the
    leaderboard's length-controlled win rate needs. Without it length alone is controlled."""
    gamed: str | None = None
    """df_gamed.csv from the same place: the leaderboard's own fit. Without it the rate is within
    about a point."""
    seed: int = 0
    """The seed of the bootstrap."""
    overwrite: bool = False
    """Replace --out if it exists."""


def main(args: Score) -> None:
    # ------------------------------------------------------------------------------ inputs
    if args.gamed and not args.difficulty:
        raise UserError("--gamed holds difficulties too: give --difficulty with it")
    annotations = read_annotations(args.annotations)
    total = len(annotations.preferences)
    difficulties = read_difficulties(args.difficulty, total) if args.difficulty else None
    gamed = winrates.Gamed(*read_gamed(args.gamed)) if args.gamed else None
    judged = ~np.isnan(annotations.preferences)
    if not judged.any():
        raise UserError(f"{args.annotations}: no row has a preference: judge the answers first")
    inputs = {name: getattr(args, name) for name in ("annotations", "difficulty", "gamed")}
    manifest = Manifest(
        stage="evaluate score",
        arguments={
            "difficulty": bool(args.difficulty),
            "gamed": bool(args.gamed),
            "seed": args.seed,
        },
        inputs={role: an_input(path) for role, path in inputs.items() if path},
        identities={},
    )
    output = Output.open(args.out, manifest, args.overwrite)
    if output.finished:
        return

    # ------------------------------------------------------------------------------ figures
    preferences = annotations.preferences[judged]
    summary = winrates.summary(preferences, args.seed)
    controlled = winrates.length_controlled(
        preferences,
        *annotations.lengths[judged].T,
        None if difficulties is None else difficulties[judged],
        gamed,
    )
    content = {
        "model": annotations.model,
        "reference": annotations.reference,
        "win_rate": 100 * summary.win_rate,
        "standard_error": _percent(summary.standard_error),
        "interval": [100 * end for end in summary.interval],
        "n_wins": summary.wins,
        "n_wins_base": summary.losses,
        "n_draws": summary.ties,
        "n_total": summary.n,
        "discrete_win_rate": 100 * summary.discrete_win_rate,
        "avg_length": int(annotations.lengths[:, 0].mean()),  # truncated, as in alpaca_eval
        "length_controlled_winrate": _percent(controlled.win_rate),
        "why": controlled.why,
        "length_control": "minimal" if difficulties is None else "v1" if gamed else "noreg",
    }

    # ------------------------------------------------------------------------------ finish
    counts = {"in": total, "out": summary.n}
    if summary.n < total:
        counts["set aside: no preference"] = total - summary.n
    output.finish_as(content, counts, content)
    for name, value in content.items():
        if value is not None:
            print(f"  {name:<26} {f'{value:.4f}' if isinstance(value, float) else value}")


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
