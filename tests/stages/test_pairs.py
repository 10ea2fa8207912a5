"""Pairs from ranked answers: which, in what form, and what is said of the others."""

import json
import os
import random
from pathlib import Path

import pytest

from stages import pairs
from stages.files.output import Manifest, an_input, read_manifest
from stages.files.paths import text_sha256
from stages.files.rows import Ranked, prompt_key
from stages.files.run import Stopped, run_main


def answer(text: str, **known) -> dict:
    return {"text": text, **known}


def row(prompt: str, scores: list, texts: list[str] | None = None, **extra) -> dict:
    texts = [f"{prompt} {i}" for i in range(len(scores))] if texts is None else texts
    return {"prompt": prompt, "responses": [answer(t) for t in texts], "scores": scores, **extra}


def ranked(path: Path, *rows, manifest: bool = False) -> Path:
    path.write_text(
        "".join(json.dumps(r) + "\n" if isinstance(r, dict) else r + "\n" for r in rows)
    )
    if manifest:
        identities = {"model": "m", "tokenizer": "t", "chat_template": "c", "ranker": "r"}
        Manifest("rank", {}, {}, identities).write(f"{path}.manifest.json")
    return path


def run(capsys, source: Path, out: Path, *flags) -> tuple[int, str, str]:
    argv = ["--ranked", str(source), "--out", str(out), *map(str, flags)]
    code = run_main(pairs.main, pairs.Args, argv)
    return code, *capsys.readouterr()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line]


def counts_of(path: Path) -> dict:
    return read_manifest(str(path)).counts


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "pairs.jsonl"


def make_pair(source: dict, strategy: str):
    args = pairs.Args(ranked="", out="", strategy=strategy)
    return pairs.make_pair(Ranked(source, "here"), args)


def pick(scores: list, texts: list[str] | None = None, strategy: str = "max-min"):
    """(chosen_index, rejected_index), or the reason why there is no pair."""
    pair, reason = make_pair(row("p", scores, texts, prompt_id="id"), strategy)
    return reason or (pair["chosen_index"], pair["rejected_index"])


# ---------------------------------------------------------------------- which answers


@pytest.mark.parametrize(
    ("scores", "texts", "expected"),
    [
        ([0.1, 3, -2.5], None, (1, 2)),
        ([5, 5, 1, 1], None, (0, 2)),  # the earlier answer wins a tie
        ([1, 5, 1, 5], None, (1, 0)),
        ([1e-300, 0], None, (0, 1)),
        ([9, 2, 1], ["", "b", "c"], (1, 2)),  # a blank answer is never chosen
        ([9, 2, 1], ["a", "b", " \n"], (0, 1)),  # nor rejected
        ([9, 2], ["\t", "b"], "fewer than two answers with text"),
        ([9], None, "fewer than two answers with text"),
        ([], None, "fewer than two answers with text"),
        ([2, 2, 2.0], None, "all scores tie"),
        ([2, 2, 1], ["a", "b", ""], "all scores tie"),
        ([0.0, -0.0], None, "all scores tie"),
        ([3, 2, 1], ["same", "b", "same"], "chosen and rejected are the same text"),
    ],
)
def test_the_best_and_the_worst_make_the_pair(scores, texts, expected):
    assert pick(scores, texts) == expected


def test_max_random_draws_any_lower_answer_by_the_prompts_id():
    scores, seen = [1, 9, 9, 3, 2], set()
    for i in range(50):
        source = row("p", scores, prompt_id=f"id{i}")
        draws = {make_pair(source, "max-random")[0]["rejected_index"] for _ in "ab"}
        assert len(draws) == 1
        seen |= draws
    assert seen == {0, 3, 4}


# ---------------------------------------------------------------------- what a pair holds


def test_a_pair_holds_the_published_columns_and_what_was_sampled(capsys, tmp_path, out):
    responses = [
        answer("good", token_ids=[5, 6], logprob=-1.5, finish_reason="stop"),
        answer("bad", token_ids=[7], logprob=-2, finish_reason="length"),
        answer("middling", token_ids=[8, 9], logprob=-3.0, finish_reason="stop"),
    ]
    comparisons = [[0, 1, 2], [-1, 0, 1], [-2, -1, 0]]
    source = ranked(
        tmp_path / "ranked.jsonl",
        {
            "prompt_id": "a",
            "prompt": "Q?",
            "prompt_token_ids": [1, 2],
            "responses": responses,
            "scores": [3, -1.25, 0],
            "comparisons": comparisons,
            "topic": {"deep": ["kept", None]},
        },
    )
    assert run(capsys, source, out)[0] == 0
    user = {"role": "user", "content": "Q?"}
    assert read(out) == [
        {
            "prompt_id": "a",
            "prompt": "Q?",
            "chosen": [user, {"role": "assistant", "content": "good"}],
            "rejected": [user, {"role": "assistant", "content": "bad"}],
            "all_generated_responses": ["good", "bad", "middling"],
            "all_rm_scores": [3.0, -1.25, 0.0],
            "chosen_index": 0,
            "rejected_index": 1,
            "comparisons": comparisons,
            "prompt_token_ids": [1, 2],
            "topic": {"deep": ["kept", None]},
            "chosen_token_ids": [5, 6],
            "chosen_logprob": -1.5,
            "chosen_finish_reason": "stop",
            "rejected_token_ids": [7],
            "rejected_logprob": -2,
            "rejected_finish_reason": "length",
        }
    ]


def test_a_conversation_stays_whole(capsys, tmp_path, out):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    source = ranked(
        tmp_path / "ranked.jsonl",
        {"messages": messages, "responses": [answer("x"), answer("y")], "scores": [1, 2]},
    )
    run(capsys, source, out)
    (pair,) = read(out)
    assert pair["messages"] == messages and pair["prompt"] == "q2"
    assert pair["chosen"] == [*messages, {"role": "assistant", "content": "y"}]
    assert pair["prompt_id"] == text_sha256(prompt_key({"messages": messages}, ""))


def test_odd_texts_survive(capsys, tmp_path, out):
    odd = ["half \ud83d", "sep\u2028arator\u0085", "😀\x00\\ud83d"]
    run(capsys, ranked(tmp_path / "ranked.jsonl", row(odd[0], [1, 2, 3], odd)), out)
    (pair,) = read(out)
    assert pair["prompt"] == odd[0] and pair["all_generated_responses"] == odd
    assert pair["chosen"][-1]["content"] == odd[2]


# ---------------------------------------------------------------------- the whole file


def many(n: int = 200) -> list[dict]:
    rng = random.Random(0)
    return [row(f"prompt {i}", [rng.randint(0, 3) for _ in range(3)]) for i in range(n)]


def test_every_prompt_is_a_pair_or_set_aside_with_its_reason(capsys, tmp_path, out):
    source = ranked(tmp_path / "ranked.jsonl", *many(), many()[0], manifest=True)
    code, stdout, _ = run(capsys, source, out)
    assert code == 0
    ties = sum(len(set(r["scores"])) == 1 for r in many())
    assert ties > 5
    assert counts_of(out) == {
        "in": 201,
        "out": 200 - ties,
        "merged: the same prompt again": 1,
        "set aside: all scores tie": ties,
    }
    aside = read(f"{out}.set_aside.jsonl")
    assert len(aside) == ties and {a["reason"] for a in aside} == {"all scores tie"}
    assert f"{ties} set aside: all scores tie" in stdout
    for pair in read(out):
        assert pair["chosen"][-1] != pair["rejected"][-1]
        assert pair["all_rm_scores"][pair["chosen_index"]] == max(pair["all_rm_scores"])
        assert pair["all_rm_scores"][pair["rejected_index"]] == min(pair["all_rm_scores"])


def test_the_manifest_carries_the_lineage(capsys, tmp_path, out):
    source = ranked(tmp_path / "ranked.jsonl", row("a", [1, 3]), row("b", [2, 8]), manifest=True)
    run(capsys, source, out, "--seed", 3)
    manifest = read_manifest(str(out))
    assert manifest.identities == {
        "model": "m",
        "tokenizer": "t",
        "chat_template": "c",
        "ranker": "r",
    }
    assert manifest.stage == "pairs" and manifest.arguments["seed"] == 3
    assert manifest.inputs == {"ranked": an_input(str(source))}
    assert manifest.results["chosen_mean_score"] == 5.5
    assert manifest.results["rejected_mean_score"] == 1.5


def test_the_same_command_again_says_that_it_is_finished(capsys, tmp_path, out):
    source = ranked(tmp_path / "ranked.jsonl", *many())
    flags = ("--test-count", 10)
    run(capsys, source, out, *flags)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, stdout, _ = run(capsys, source, out, *flags)
    assert code == 0 and stdout.count("finished already") == 2
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, _, stderr = run(capsys, source, out, "--test-count", 11)
    assert code == 2 and "arguments.test_count 10 there, 11 here" in stderr


def test_a_stopped_run_goes_on_to_the_same_bytes(capsys, tmp_path, out, monkeypatch):
    source = ranked(tmp_path / "ranked.jsonl", *many())
    run(capsys, source, tmp_path / "whole.jsonl", "--test-fraction", 0.3)
    make_pair, calls = pairs.make_pair, []

    def stopping(*args):
        calls.append(1)
        if len(calls) in (230, 550, 900):  # the first 200 calls of a run are its check
            raise Stopped("stopped by SIGTERM, the work is saved")
        return make_pair(*args)

    monkeypatch.setattr(pairs, "make_pair", stopping)
    codes = [run(capsys, source, out, "--test-fraction", 0.3)[0] for _ in range(4)]
    assert codes == [75, 75, 75, 0]
    for end in (".jsonl", ".test.jsonl", ".jsonl.set_aside.jsonl"):
        assert (tmp_path / f"pairs{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
    stopped, whole = (
        json.loads((tmp_path / f"{name}.jsonl.manifest.json").read_text()) | {"seconds": None}
        for name in ("pairs", "whole")
    )
    assert stopped == whole


# ---------------------------------------------------------------------- the test split


def ids(path: Path) -> set[str]:
    return {pair["prompt_id"] for pair in read(path)}


def test_the_splits_share_no_prompt_and_lose_none(capsys, tmp_path, out):
    rows = [row(f"prompt {i}", [1, 2]) for i in range(300)]
    source = ranked(tmp_path / "ranked.jsonl", *rows, row("tie", [1, 1]))
    run(capsys, source, out, "--test-fraction", 0.2)
    train, test = ids(out), ids(tmp_path / "pairs.test.jsonl")
    assert not train & test and len(train | test) == 300
    assert 40 <= len(test) <= 80
    for path, other in ((out, "test"), (tmp_path / "pairs.test.jsonl", "train")):
        counts = counts_of(path)
        assert counts["in"] == 301
        assert counts["in"] == counts["out"] + counts[f"split off: {other}"] + counts.get(
            "set aside: all scores tie", 0
        )


def test_a_prompts_split_depends_on_neither_order_nor_other_prompts(capsys, tmp_path, out):
    rows = [row(f"prompt {i}", [1, 2]) for i in range(200)]
    run(capsys, ranked(tmp_path / "a.jsonl", *rows), out, "--test-fraction", 0.1)
    half = ranked(tmp_path / "b.jsonl", *reversed(rows[:100]))
    run(capsys, half, tmp_path / "half.jsonl", "--test-fraction", 0.1)
    test, half_test = ids(tmp_path / "pairs.test.jsonl"), ids(tmp_path / "half.test.jsonl")
    assert half_test == test & (ids(tmp_path / "half.jsonl") | half_test) and half_test

    run(capsys, half, tmp_path / "other.jsonl", "--test-fraction", 0.1, "--seed", 1)
    assert ids(tmp_path / "other.test.jsonl") != half_test


def test_test_count_takes_that_many_prompts(capsys, tmp_path, out):
    source = ranked(tmp_path / "ranked.jsonl", *(row(f"p{i}", [1, 2]) for i in range(50)))
    run(capsys, source, out, "--test-count", 7, "--test-out", tmp_path / "held" / "t.jsonl")
    assert len(ids(out)) == 43 and len(ids(tmp_path / "held" / "t.jsonl")) == 7


# ---------------------------------------------------------------------- the caller's mistakes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row("b", [1, 2, 3], ["x", "y"]), "line 2: 3 scores for 2 responses: give one for each"),
        (row("b", [1, None]), "line 2, scores[1]: None is no finite number"),
        (row("b", [1, "2"]), "line 2, scores[1]: '2' is no finite number"),
        (row("b", [True, 2]), "line 2, scores[0]: True is no finite number"),
        (row("b", "12"), "line 2: field 'scores' is str, not list"),
        ('{"prompt": "b", "responses": [], "scores": [NaN]}', "line 2: not JSON (NaN"),
        ('{"prompt": "b", "responses": [], "scores": [-Infinity]}', "line 2: not JSON (-Inf"),
        (json.dumps(row("b", [0, 1])).replace("[0, 1]", "[0, 1e999]"), "inf is no finite number"),
        (row("b", [1, 10**400]), "is no finite number"),
        (row("b", [1, -1e200]), "-1e+200 is no finite number up to 1e+100"),
        ({"prompt": "b", "scores": [1]}, "line 2: field 'responses' is missing"),
        ({"prompt": "b", "responses": [answer("x")]}, "line 2: field 'scores' is missing"),
        ({"prompt": "b", "responses": ["x"], "scores": [1]}, "responses[0]: a str, not an object"),
        ({"prompt": "b", "responses": [{}], "scores": [1]}, "field 'text' is missing"),
        (
            {"prompt": "b", "responses": [answer("x", token_ids="1 2")], "scores": [1]},
            "field 'token_ids' is str, not list",
        ),
        (row("b", [1, 2], chosen="mine"), "stages.pairs makes the field 'chosen' itself: rename"),
        (row("a", [2, 1]), "stood above with another prompt or other responses or other scores"),
        (row("other", [2, 1], prompt_id=text_sha256("a")), "stood above with another"),
        (row(" ", [1, 2]), "line 2: the prompt is empty"),
    ],
)
def test_a_malformed_row_is_named(capsys, tmp_path, out, line, message):
    source = ranked(tmp_path / "ranked.jsonl", row("a", [1, 2]), line)
    code, _, stderr = run(capsys, source, out)
    assert code == 2 and message in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert not list(tmp_path.glob("pairs*"))
    ranked(source, row("a", [1, 2]))
    assert run(capsys, source, out)[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--test-fraction", 1), "must be at least 0 and below 1"),
        (("--test-fraction", "nan"), "--test-fraction is nan: give a finite number"),
        (("--test-count", -1), "must not be negative"),
        (("--test-count", 2), "leaves none of the 2 prompts to train on"),
        (("--test-count", 1, "--test-fraction", 0.5), "not both"),
        (("--test-out", "t.jsonl"), "--test-out needs"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(capsys, tmp_path, out, flags, message):
    source = ranked(tmp_path / "ranked.jsonl", row("a", [1, 2]), row("b", [1, 2]))
    code, _, stderr = run(capsys, source, out, *flags)
    assert code == 2 and message in stderr and stderr.count("\n") == 1


def test_paths_that_cannot_be_are_refused(capsys, tmp_path, out):
    source = ranked(tmp_path / "ranked.jsonl", row("a", [1, 2]), row("b", [1, 2]))
    assert "does not exist" in run(capsys, tmp_path / "absent.jsonl", out)[2]
    assert "is the input" in run(capsys, source, source, "--overwrite")[2]
    same = run(capsys, source, out, "--test-count", 1, "--test-out", out)
    assert same[0] == 2 and "are the same file" in same[2]
    assert len(read(source)) == 2


def test_what_is_in_the_way_of_the_test_split_is_found_before_a_pair_is_written(
    capsys, tmp_path, out
):
    source = ranked(tmp_path / "ranked.jsonl", *many(20))
    (tmp_path / "mine.jsonl").write_text("mine\n")
    ranked(tmp_path / "other.jsonl", row("a", [1, 2]), manifest=True)
    os.mkfifo(tmp_path / "pipe")
    for place, words in (
        (f"{tmp_path}/new/", "is a folder"),
        (tmp_path, "is a folder"),
        (tmp_path / "mine.jsonl", "has no manifest"),
        (tmp_path / "mine.jsonl" / "t.jsonl", "cannot be made"),
        (tmp_path / "other.jsonl", "from other arguments"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / ("x" * 300), "cannot be written"),
    ):
        code, _, stderr = run(capsys, source, out, "--test-count", 5, "--test-out", place)
        assert code == 2 and words in stderr and stderr.count("\n") == 1
        assert not out.exists()
    assert (tmp_path / "mine.jsonl").read_text() == "mine\n"
    assert run(capsys, source, out, "--test-count", 5)[0] == 0
