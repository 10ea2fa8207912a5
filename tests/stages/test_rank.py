"""The rank stage with PairRM: resuming, strategies, backends, its report, and wrong input."""

import json
import os
import signal

import numpy as np
import pytest

from model.rankers import pairrm
from stages import rank
from stages.files.run import run_main
from tests import tiny, tiny_pairrm

ROWS = [
    {"prompt_id": "a", "prompt": "A colour?", "responses": ["Red.", "Blue is a colour!", "No"]},
    {"prompt_id": "b", "prompt": "Why?", "responses": ["Because.", "Because.", "Who knows…", ""]},
    {"prompt_id": "one", "prompt": "Only one?", "responses": ["Yes."]},
    {"prompt_id": "none", "prompt": "None?", "responses": []},
    {
        "prompt_id": "turns",
        "responses": ["Rome.", "Italy has many."],
        "messages": [
            {"role": "user", "content": "Where is Italy?"},
            {"role": "assistant", "content": "In Europe."},
            {"role": "user", "content": "And its capital?"},
        ],
    },
    {
        "prompt_id": "broken",
        "responses": ["x", "y"],
        "messages": [{"role": "user", "content": "One?"}, {"role": "user", "content": "Two?"}],
    },
    {"prompt_id": "c", "prompt": "Long? " * 40, "responses": ["w " * 30, "short", "w x " * 90]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rank")
    tiny_pairrm.write_pairrm(folder / "pairrm")
    rows = [row | {"responses": [{"text": text} for text in row["responses"]]} for row in ROWS]
    tiny.write_jsonl(folder / "samples.jsonl", rows)
    assert run(folder, "base.jsonl") == 0
    return folder


def run(folder, out, *more, ranker=None):
    argv = [
        "--ranker",
        ranker or str(folder / "pairrm"),
        "--samples",
        str(folder / "samples.jsonl"),
        "--out",
        str(folder / out),
        *more,
    ]
    return run_main(rank.main, rank.Args, argv)


def by_id(folder, name):
    return {row["prompt_id"]: row for row in tiny.read_jsonl(folder / name)}


def manifest(folder, name):
    return json.loads((folder / f"{name}.manifest.json").read_text())


def same(one, other, atol=1e-5):
    assert one.keys() == other.keys()
    for prompt_id, row in one.items():
        np.testing.assert_allclose(row["scores"], other[prompt_id]["scores"], atol=atol)
        ours, theirs = (np.array(r["comparisons"], float) for r in (row, other[prompt_id]))
        np.testing.assert_allclose(ours, theirs, atol=atol)


def test_rows_gain_scores_and_the_raw_matrix_and_what_cannot_be_ranked_is_set_aside(folder):
    rows = by_id(folder, "base.jsonl")
    assert list(rows) == ["a", "b", "one", "turns", "c"]
    for row in rows.values():
        matrix = np.array(row["comparisons"])
        n = len(row["responses"])
        assert matrix.shape == (n, n)
        np.testing.assert_allclose(row["scores"], (matrix - matrix.T).mean(axis=1), atol=1e-6)
    assert rows["one"]["scores"] == [0.0]
    assert rows["b"]["scores"][0] == rows["b"]["scores"][1]
    reasons = {
        x["row"]["prompt_id"]: x["reason"]
        for x in tiny.read_jsonl(folder / "base.jsonl.set_aside.jsonl")
    }
    assert reasons == {"none": "no responses", "broken": "user and assistant do not take turns"}


def test_the_manifest_records_what_the_run_reports(folder):
    found = manifest(folder, "base.jsonl")
    assert found["arguments"] == {
        "comparisons": "full",
        "aggregation": "max_logits",
        "backend": "jax",
        "dtype": "float32",
    }
    results = found["results"]
    # Pairs of different answers: 3 of a, 5 of b, 1 of turns, 3 of c.
    assert results["pairs"] == 12
    assert results["truncation_rate"] == 0
    assert 0 <= results["swap_consistency"] <= 1
    assert results["tie_rate"] == 0
    assert -1 <= results["score_length_correlation"] <= 1


def test_killed_between_prompts_it_goes_on_and_ends_with_the_same_scores(folder, monkeypatch):
    made = []
    logits = pairrm.PairRM.logits

    def stopped(self, comparisons, done):
        made.append(len(comparisons))
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return logits(self, comparisons, done)

    monkeypatch.setattr(pairrm.PairRM, "logits", stopped)
    monkeypatch.setattr(pairrm.PairRM, "enough", lambda self, asked: len(asked) >= 4)
    assert run(folder, "killed.jsonl") == 75
    kept = len((folder / "killed.jsonl.partial").read_text().splitlines())
    assert 0 < kept < len(ROWS)
    assert run(folder, "killed.jsonl") == 0
    same(by_id(folder, "base.jsonl"), by_id(folder, "killed.jsonl"))
    for name in ("counts", "arguments"):
        assert manifest(folder, "base.jsonl")[name] == manifest(folder, "killed.jsonl")[name]
    assert sum(made) < 2 * 25  # what was ranked is not compared again


def test_the_order_of_the_rows_changes_nothing(folder, tmp_path):
    rows = tiny.read_jsonl(folder / "samples.jsonl")[::-1]
    (tmp_path / "pairrm").symlink_to(folder / "pairrm")
    tiny.write_jsonl(tmp_path / "samples.jsonl", rows)
    assert run(tmp_path, "out.jsonl") == 0
    same(by_id(folder, "base.jsonl"), by_id(tmp_path, "out.jsonl"))


def test_llm_blender_as_backend_gives_the_same_scores(folder):
    assert run(folder, "blender.jsonl", "--backend", "llm-blender") == 0
    same(by_id(folder, "base.jsonl"), by_id(folder, "blender.jsonl"), atol=1e-4)


def test_bubble_and_max_wins_agree_with_the_full_matrix(folder):
    assert run(folder, "bubble.jsonl", "--comparisons", "bubble") == 0
    assert run(folder, "wins.jsonl", "--aggregation", "max_wins", "--device", "host") == 0
    base, bubble = by_id(folder, "base.jsonl"), by_id(folder, "bubble.jsonl")
    for prompt_id, row in by_id(folder, "wins.jsonl").items():
        matrix = np.array(base[prompt_id]["comparisons"])
        wins = (matrix > 0).sum(axis=1) + (matrix < 0).sum(axis=0)
        assert row["scores"] == wins.tolist()
        known = bubble[prompt_id]["comparisons"]
        for i, j in np.ndindex(*matrix.shape):
            if known[i][j] is not None and i != j:
                assert known[i][j] == pytest.approx(matrix[i][j], abs=1e-5)
        assert set(bubble[prompt_id]["scores"]) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(
    ("ranker", "flags", "words"),
    [
        ("nothing/here", [], "hub"),
        ("/no/folder", [], "neither a folder nor a hub id"),
        ("https://huggingface.co/llm-blender/PairRM", [], "https:// is not supported"),
        ("s3://bucket/PairRM", [], "s3:// is not supported"),
        ("file:///srv/PairRM", [], "file:// is not supported"),
        ("{0}", [], "config.json is missing"),
        ("{0}/pairrm", ["--comparisons", "bubble", "--aggregation", "max_wins"], "bubble"),
        ("{0}/reward.py:reward", ["--backend", "jax"], "--backend is for PairRM"),
        ("{0}/reward.py", [], "FILE.py:FUNCTION"),
        ("{0}/pairrm", ["--backend", "llm-blender", "--dtype", "bfloat16"], "--dtype is for"),
    ],
)
def test_a_wrong_ranker_or_flag_is_told_in_one_line(folder, capsys, ranker, flags, words):
    (folder / "reward.py").write_text("def reward(p, r): return [0.0] * len(r)")
    assert run(folder, "never.jsonl", *flags, ranker=ranker.format(folder)) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1 and words in lines[0]
    assert not (folder / "never.jsonl").exists()


def test_the_ranker_is_never_written_over(folder, tmp_path, capsys):
    file = tmp_path / "reward.py"
    file.write_text("def reward(p, r): return [0.0] * len(r)")
    (tmp_path / "link.jsonl").symlink_to(file)
    (tmp_path / "samples.jsonl").symlink_to(folder / "samples.jsonl")
    for out in ("reward.py", "link.jsonl"):
        assert run(tmp_path, out, "--overwrite", ranker=f"{file}:reward") == 2
        assert "is the input (--ranker)" in capsys.readouterr().err
    assert file.read_text().startswith("def reward")
    before = (folder / "pairrm" / "config.json").read_bytes()
    assert run(folder, "pairrm/config.json", "--overwrite") == 2
    assert "a part of the input" in capsys.readouterr().err
    assert (folder / "pairrm" / "config.json").read_bytes() == before


def test_what_an_earlier_ranking_left_in_a_row_is_replaced(folder, tmp_path):
    (tmp_path / "reward.py").write_text("def reward(p, r): return [float(len(x)) for x in r]")
    rows = [
        row | {"comparisons": 5, "truncated": True, "score_terms": "x", "kept": 7}
        for row in tiny.read_jsonl(folder / "samples.jsonl")
    ]
    tiny.write_jsonl(tmp_path / "samples.jsonl", rows)
    assert run(tmp_path, "out.jsonl", ranker=f"{tmp_path / 'reward.py'}:reward") == 0
    for row in by_id(tmp_path, "out.jsonl").values():
        assert not {"comparisons", "truncated", "score_terms"} & row.keys()
        assert row["kept"] == 7
    results = manifest(tmp_path, "out.jsonl")["results"]
    kept = {"score_length_correlation", "ranker", "sha256", "set_aside_sha256"}
    assert set(results) == kept
    assert results["ranker"] == "reward.py:reward"  # not its folder


def test_a_text_that_breaks_llm_blender_is_told_in_one_line(folder, tmp_path, capsys):
    row = {"prompt": "What is <|source|>?", "responses": [{"text": "a"}, {"text": "b"}]}
    tiny.write_jsonl(tmp_path / "samples.jsonl", [row | {"prompt_id": "x"}])
    (tmp_path / "pairrm").symlink_to(folder / "pairrm")
    assert run(tmp_path, "out.jsonl", "--backend", "llm-blender") == 2
    assert "--backend jax" in capsys.readouterr().err
    assert run(tmp_path, "out.jsonl", "--overwrite") == 0
