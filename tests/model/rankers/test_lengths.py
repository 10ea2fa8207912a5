"""Lengths: their figures, and pairs chosen with a price on length."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from model.rankers import lengths
from stages import pairs
from stages.files.output import Manifest, read_manifest
from stages.files.rows import Ranked, json_rows
from stages.files.run import run_main


def answers(*sizes: int, tokens: bool = False) -> list[dict]:
    return [
        {"text": f"{i}".ljust(n, "x")} | ({"token_ids": [7] * (n // 4)} if tokens else {})
        for i, n in enumerate(sizes)
    ]


def ranked(path: Path, rows: list[tuple[list[float], list[int]]], tokens: bool = False) -> Path:
    path.write_text(
        "".join(
            json.dumps({"prompt": f"p{i}", "scores": s, "responses": answers(*n, tokens=tokens)})
            + "\n"
            for i, (s, n) in enumerate(rows)
        )
    )
    return path


def run(capsys, source: Path, out: Path, *flags) -> tuple[int, str, Manifest]:
    argv = ["--ranked", str(source), "--out", str(out), *map(str, flags)]
    code = run_main(pairs.main, pairs.Args, argv)
    return code, "".join(capsys.readouterr()), read_manifest(str(out))


# ---------------------------------------------------------------------- the figures


def test_correlations_are_scipys_of_what_is_left_within_a_prompt():
    rng = np.random.default_rng(0)
    scores = [rng.normal(100 * i, 1, n) for i, n in enumerate((5, 2, 7, 1))]
    sizes = [rng.integers(1, 900, len(s)) for s in scores]

    def left(rows, of=np.array):
        return np.concatenate([of(r) - np.mean(of(r)) for r in rows])

    expected = stats.pearsonr(left(scores), left(sizes))[0]
    assert lengths.correlation(scores, sizes) == pytest.approx(expected)
    expected = stats.pearsonr(left(scores, stats.rankdata), left(sizes, stats.rankdata))[0]
    assert lengths.correlation(scores, sizes, ranks=True) == pytest.approx(expected)
    assert lengths.correlation(scores[:1], sizes[:1], ranks=True) == pytest.approx(
        stats.spearmanr(scores[0], sizes[0])[0]
    )
    assert lengths.correlation([[1, 1]], [[2, 3]]) is None
    assert lengths.correlation([], []) is None


def test_the_manifest_has_the_lengths_of_sampled_chosen_and_rejected_answers(capsys, tmp_path):
    rows = [([1, 2, 3], [40, 80, 120]), ([5, 4, 0], [400, 8, 12]), ([1, 1], [20, 40])]
    source = ranked(tmp_path / "r.jsonl", rows, tokens=True)
    code, shown, manifest = run(capsys, source, tmp_path / "p.jsonl")
    assert code == 0
    characters, tokens = (manifest.results["lengths"][unit] for unit in ("characters", "tokens"))
    assert characters["sampled"]["n"] == 8 and characters["sampled"]["mean"] == 90
    assert characters["chosen"]["n"] == 2 and characters["chosen"]["mean"] == 260
    assert characters["rejected"]["mean"] == 26 and characters["gap"] == 234
    assert characters["chosen"]["deciles"] == pytest.approx(np.linspace(120, 400, 11))
    assert tokens["chosen"]["mean"] == 65 and tokens["gap"] == 58.5
    assert manifest.results["score_length_correlation"] == pytest.approx(
        lengths.correlation(*zip(*rows))
    )
    assert "mean characters: sampled 90, chosen 260, rejected 26\ncorrelation" in shown
    assert "gap_without_length_penalty" not in manifest.results


def test_without_token_ids_there_are_characters_alone_and_without_pairs_no_gap(capsys, tmp_path):
    source = ranked(tmp_path / "r.jsonl", [([1, 1], [20, 40])])
    _, _, manifest = run(capsys, source, tmp_path / "p.jsonl", "--length-penalty", 1)
    characters = manifest.results["lengths"]["characters"]
    assert manifest.results["lengths"].keys() == {"characters"} and "gap" not in characters
    assert characters["chosen"] == {"n": 0}
    assert "score_length_correlation" not in manifest.results


# ---------------------------------------------------------------------- the penalty


def pick(scores: list, sizes: list, penalty: float, strategy: str = "max-min"):
    row = {"prompt": "p", "responses": answers(*sizes), "scores": scores}
    args = pairs.Args("in", "out", strategy=strategy, length_penalty=penalty)
    return pairs.choose(Ranked(row, "here"), args)


@pytest.mark.parametrize(
    ("scores", "sizes", "penalty", "expected"),
    [
        ([3, 2.9, 0, 0.1], [900, 100, 100, 900], 0, (0, 2)),
        ([3, 2.9, 0, 0.1], [900, 100, 100, 900], 0.25, (1, 3)),
        ([3, 1, 0], [900, 100, 110], 0.25, (0, 2)),  # a clear preference stays
        ([3, 2, 1], [50, 50, 50], 9, (0, 2)),  # equally long: nothing to choose by
        ([2, 1, 0], [900, 500, 1], 50, "the length penalty outweighs the scores"),
        ([2, 1, 3], [900, 500, 1], 50, (2, 0)),  # the rejected scores below the chosen
        ([1, 1, 1], [900, 500, 1], 0.25, "all scores tie"),
        # The blank answer counts in no mean: with it, the first would be chosen.
        ([1, 0.2, 0], [100, 60, 40], 0.5, (0, 2)),
    ],
)
def test_length_costs_score(scores, sizes, penalty, expected):
    assert pick(scores, sizes, penalty) == expected
    # Whatever the ranker's unit and the texts' scale.
    scaled = [7 * s - 30 for s in scores]
    assert pick(scaled, sizes, penalty) == expected


def test_a_penalised_score_is_a_z_score_less_that_of_the_length():
    scores, sizes = [0.3, -1.2, 2.5, 0.9], [10, 400, 320, 90]
    expected = stats.zscore(scores) - 0.7 * stats.zscore(sizes)
    assert lengths.penalised(scores, sizes, 0.7) == pytest.approx(expected)


def biased(n: int = 300) -> list[tuple[list[float], list[int]]]:
    """Scores of quality and, as of a judge that likes length, of length."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(50, 2000, (n, 5))
    return [((rng.normal(size=5) + s / 800).tolist(), s.tolist()) for s in sizes]


@pytest.mark.parametrize("strategy", ["max-min", "max-random"])
def test_the_gap_narrows_and_the_stage_shows_it(capsys, tmp_path, strategy):
    source = ranked(tmp_path / "r.jsonl", biased())
    gaps = []
    for penalty in (0, 0.3):
        flags = ("--length-penalty", penalty, "--strategy", strategy)
        code, shown, manifest = run(capsys, source, tmp_path / f"{penalty}.jsonl", *flags)
        gaps.append(manifest.results["lengths"]["characters"]["gap"])
        assert code == 0 and "warning" not in shown
    assert gaps[0] > 300 and abs(gaps[1]) < 0.7 * gaps[0]
    assert manifest.results["gap_without_length_penalty"] == pytest.approx(gaps[0])
    assert f"{gaps[0]:+.0f} without the penalty, {gaps[1]:+.0f} with" in shown
    for _, row in json_rows(str(tmp_path / "0.3.jsonl")):
        scores = row["all_rm_scores"]
        assert scores[row["chosen_index"]] > scores[row["rejected_index"]]
        assert scores == biased()[int(row["prompt"][1:])][0]  # the ranker's, as they were


def test_a_gap_that_does_not_narrow_is_a_warning(capsys, tmp_path):
    rows = [([s, -s, 0.9 * s], n) for s, n in ((1.0, [300, 900, 10]), (2.0, [250, 800, 20]))]
    source = ranked(tmp_path / "r.jsonl", rows)
    code, shown, _ = run(capsys, source, tmp_path / "p.jsonl", "--length-penalty", 0.5)
    assert code == 0 and "-575 without the penalty, -835 with" in shown
    assert "warning: --length-penalty does not narrow the gap" in shown


@pytest.mark.parametrize("penalty", ["-0.1", "nan", "inf"])
def test_a_penalty_that_is_none_is_refused(capsys, tmp_path, penalty):
    source = ranked(tmp_path / "r.jsonl", biased(3))
    code, shown, _ = run(capsys, source, tmp_path / "p.jsonl", f"--length-penalty={penalty}")
    assert code == 2 and re.search(rf"error: --length-penalty (is )?{penalty}\b", shown)
