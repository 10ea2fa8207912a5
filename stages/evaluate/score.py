"""AlpacaEval's annotations (a judge's preferences) to its win rates."""

import dataclasses

import numpy as np

from sharding.errors import UserError
from stages.evaluate import difficulty, winrates
from stages.evaluate.answers import generator_of_rows, read_json_list
from stages.files.output import Manifest, Output
from stages.files.paths import file_sha256
from stages.files.rows import Row, field


@dataclasses.dataclass
class Score:
    """The leaderboard's figures of a file of annotations, in percent as there.

    Win rate, its standard error, discrete win rate, average length (characters, truncated) and
    length-controlled win rate. A preference lies between 1 (the reference won) and 2 (the model
    did); rows without one are left out, and counted.
    """

    annotations: str
    """annotations.json, as alpaca_eval or `judge` writes it."""
    out: str
    """The JSON file to write."""
    difficulty: str | None = None
    """instruction_difficulty.csv of the hub's tatsu-lab/alpaca_eval (or a JSON of it), which the
    leaderboard's length-controlled win rate takes; without it, length alone is controlled."""
    gamed: str | None = None
    """df_gamed.csv of the same: the leaderboard's own fit; without it, within about a point."""
    seed: int = 0
    """Of the bootstrap."""
    overwrite: bool = False
    """Replace an --out that is there."""


def main(args: Score) -> None:
    if args.gamed and not args.difficulty:
        raise UserError("--gamed holds difficulties too: give --difficulty with it")
    rows = read_json_list(args.annotations)
    inputs = [path for path in (args.annotations, args.difficulty, args.gamed) if path]
    manifest = Manifest(
        stage="evaluate score",
        arguments={
            "difficulty": bool(args.difficulty),
            "gamed": bool(args.gamed),
            "seed": args.seed,
        },
        inputs={path: file_sha256(path) for path in inputs},
        identities={},
    )
    output = Output.open(args.out, manifest, args.overwrite)
    if output.finished:
        return
    preferences = np.array([_preference(row, where) for where, row in rows])
    lengths = np.array(
        [
            [len(field(row, name, str, where)) for name in ("output_2", "output_1")]
            for where, row in rows
        ]
    )
    difficulties = difficulty.read(args.difficulty, len(rows)) if args.difficulty else None
    gamed = difficulty.read_gamed(args.gamed) if args.gamed else None
    known = ~np.isnan(preferences)
    if not known.any():
        raise UserError(f"{args.annotations}: no row has a preference: judge the answers first")
    found = winrates.summary(preferences[known], args.seed)
    controlled = winrates.length_controlled(
        preferences[known],
        *lengths[known].T,
        None if difficulties is None else difficulties[known],
        gamed,
    )
    content = {
        "model": generator_of_rows(rows, "generator_2"),
        "reference": generator_of_rows(rows, "generator_1"),
        "win_rate": 100 * found.win_rate,
        "standard_error": None if found.standard_error is None else 100 * found.standard_error,
        "interval": [100 * end for end in found.interval],
        "n_wins": found.wins,
        "n_wins_base": found.losses,
        "n_draws": found.ties,
        "n_total": found.n,
        "discrete_win_rate": 100 * found.discrete_win_rate,
        "avg_length": int(lengths[:, 0].mean()),  # truncated, as in alpaca_eval
        "length_controlled_winrate": (
            None if controlled.win_rate is None else 100 * controlled.win_rate
        ),
        "why": controlled.why,
        "length_control": "minimal" if difficulties is None else "v1" if gamed else "noreg",
    }
    counts = {"in": len(rows), "out": found.n}
    if found.n < len(rows):
        counts["set aside: no preference"] = len(rows) - found.n
    output.finish_as(content, counts, content)
    for name, value in content.items():
        if value is not None:
            print(f"  {name:<26} {f'{value:.4f}' if isinstance(value, float) else value}")


def _preference(row: Row, where: str) -> float:
    """Between 0 and 1; NaN where the judge gave none."""
    value = row.get("preference")
    if value is None or value != value:
        return np.nan
    value = field(row, "preference", (int, float), where)
    value = 1.5 if value == 0 else value  # as early files wrote a draw
    if not 1 <= value <= 2:
        raise UserError(f"{where}: preference is {value}, not between 1 and 2: correct the file")
    return value - 1
