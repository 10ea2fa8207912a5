"""A reward function sees the same, and gives the same scores, in every command that calls it."""

import json

import pytest

from scripts.report import tables
from scripts.report.gather import Model
from sharding.errors import UserError
from stages.evaluate import outputs
from stages.files import benchmarks, rows
from tests import tiny
from tests.stages.chain import run_rank
from tests.stages.test_evaluate import run
from tests.stages.test_rows import talk

# What it scores an answer with is written down.
SEEING = """
import json
def reward(prompt, responses, finish_reasons):
    with open({log!r}, "a") as file:
        for seen in zip(responses, finish_reasons):
            file.write(json.dumps([prompt, *seen]) + "\\n")
    return [len(r) + 0.5 * (f == "stop") for r, f in zip(responses, finish_reasons)]
"""
CONVERSATIONS = [
    {"prompt_id": "a", "prompt": "One?"},
    {"prompt_id": "b", "messages": talk("One?", "Two.", "Three?")},
    {"prompt_id": "c", "messages": talk("One?", system="Be brief.")},
]


def test_rank_compare_and_best_of_show_a_reward_the_same(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "reward.py").write_text(SEEING.format(log=str(log)))
    answers = [
        {"text": "a long answer", "finish_reason": "length"},
        {"text": "no reason"},
        {"text": "null", "finish_reason": None},
        {"text": "", "finish_reason": "stop_string"},
    ]
    tiny.write_jsonl(
        tmp_path / "samples.jsonl", [row | {"responses": answers} for row in CONVERSATIONS]
    )
    assert run_rank(tmp_path) == 0
    ranked = {row["prompt_id"]: row["scores"] for row in tiny.read_jsonl(tmp_path / "ranked.jsonl")}
    assert ranked["a"] == ranked["b"] == ranked["c"] == [13.0, 9.5, 4.5, 0.0]
    seen = {(p, r): f for p, r, f in map(json.loads, log.read_text().splitlines())}
    assert {p for p, _ in seen} == {"One?", "Three?"}

    best = rows.read(str(tmp_path / "ranked.jsonl"), rows.Ranked)
    args = outputs.Outputs("C", str(tmp_path / "best.json"), best_of=4, ranker="r.py:f")
    outputs.write_outputs(args, best)
    assert [row["finish_reason"] for row in json.loads((tmp_path / "best.json").read_text())] == [
        "length"
    ] * 3
    compared = {}
    for number in range(4):
        log.unlink()
        files = ("--outputs", tmp_path / "best.json", "--baseline", tmp_path / "samples.jsonl")
        ranker = ("--ranker", f"{tmp_path}/reward.py:reward", "--response", number)
        assert run("compare", *files, *ranker, "--out", tmp_path / f"{number}.json") == 0
        again = {(p, r): f for p, r, f in map(json.loads, log.read_text().splitlines())}
        assert again.items() <= seen.items()
        content = json.loads((tmp_path / f"{number}.json").read_text())
        compared[number] = [row["margin"] for row in content["per_instruction"]]
    assert compared == {i: [13.0 - ranked["a"][i]] * 3 for i in range(4)}


@pytest.mark.parametrize("reason", ["", "eos", "Stop", 0, True, [], ["stop"], {}])
def test_a_finish_reason_of_another_kind_is_named(tmp_path, reason):
    row = {"prompt": "p", "responses": [{"text": "a"}, {"text": "b", "finish_reason": reason}]}
    with pytest.raises(UserError, match=r"^here, responses\[1\]: field 'finish_reason' is"):
        rows.Sample(row, "here")
    pair = {"prompt": "p", "chosen": talk("p", "a"), "rejected": talk("p", "b")}
    with pytest.raises(UserError, match="field 'rejected_finish_reason' is"):
        rows.Pair(pair | {"rejected_finish_reason": reason}, "here")
    output = {"instruction": "p", "output": "a", "finish_reason": reason}
    (tmp_path / "o.json").write_text(json.dumps([output]))
    with pytest.raises(UserError, match="item 0: field 'finish_reason' is"):
        benchmarks.read_outputs(str(tmp_path / "o.json"))


def test_the_report_counts_an_answer_without_a_reason_as_finished():
    answers = [{"text": "a", "finish_reason": None}, {"text": "b"}]
    model = Model("start", [{"prompt_id": "p", "responses": answers}], {}, {}, [])
    assert tables.iterations([model])[0]["finished"] == "100%"


def test_terms_that_some_answers_lack_are_means_over_the_others():
    terms = [{"a": 1.0}, {"a": 3.0, "b": 5.0}]
    model = Model("start", [{"responses": [], "score_terms": terms}], {}, {}, [])
    assert model.terms() == {"a": 2.0, "b": 5.0}
