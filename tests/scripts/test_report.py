"""The page of a run, and its table in the terminal: on a run of small files, complete and not."""

import json
import os
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from scripts import ready
from scripts.report import __main__ as report
from scripts.report import gather, graph, tables
from stages import pairs, rank
from stages.evaluate import compare
from stages.files.output import Manifest, Output, an_input
from stages.files.paths import file_sha256, text_sha256
from stages.files.run import run_main
from tests import tiny

PROMPTS = ["Why is the sky blue?", "Say </script><b>bold</b> & more.", "Name a colour.", "Ünïcödé?"]
MODELS = {  # the score of an answer is how many different letters it has
    "start": ["aaa", "bbb", "cc", "dd"],
    "iteration_1": ["abcd", "bbb", "cdefg", "<script>alert(1)</script><!--"],
    "iteration_2": ["abcdef", "b", "cdefg", "abcd\ud83d"],
}
LOSSES = {"iteration_1": [0.693, 0.6], "iteration_2": [0.693, 0.5]}


def samples(path, texts: list[list[str]], identity: str) -> str:
    """As stages.sample writes them."""
    identities = {"model": identity, "tokenizer": "t", "chat_template": "c"}
    prompts = an_input(str(path.parents[1] / "prompts.jsonl"), text_sha256("prompts"))
    manifest = Manifest(
        "sample", {"n": len(texts[0]), "dtype": "bfloat16"}, {"prompts": prompts}, identities
    )
    output = Output.open(str(path), manifest)
    for prompt, answers in zip(PROMPTS, texts):
        responses = [
            {
                "text": text,
                "token_ids": list(range(len(text))),
                "logprob": -1.0,
                "finish_reason": "stop" if len(text) > 2 else "length",
            }
            for text in answers
        ]
        output.write({"prompt_id": prompt, "prompt": prompt, "responses": responses})
    sitting = {"tokens": 30, "seconds": 1.5, "slots": 2}
    output.finish(PROMPTS, Counter({"in": len(PROMPTS)}), {"last_sitting": sitting})
    return str(path)


def checkpoint(folder, identity: str, origin: dict) -> None:
    folder.mkdir(parents=True)
    content = {"identity": identity, "parameters": 1, "origin": origin}
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What scripts/iterate.sh leaves after two iterations; only the models are made up."""
    run = tmp_path_factory.mktemp("runs") / "small"
    reward = run.parent / "reward.py"
    reward.write_text(
        "def reward(prompt, responses):\n    return [len(set(r)) for r in responses]\n"
        "reward.terms = lambda prompt, response, reason: {'letters': len(set(response))}\n"
    )
    ranker = f"{reward}:reward"
    checkpoint(run / "start/checkpoint", "0" * 64, {"source": "made up"})
    (run / "settings.json").write_text('{"SEED": 0, "ranker": "<r>", "dpo.beta": 0.1}')
    before = None
    for k, (name, texts) in enumerate(MODELS.items()):
        it = run / name
        if before is not None:
            sampled = samples(
                it / "samples.jsonl", [[t, t + "xyz", t] for t in MODELS[before]], str(k - 1) * 64
            )
            rank.main(rank.Args(ranker, sampled, str(it / "ranked.jsonl")))
            pairs.main(pairs.Args(str(it / "ranked.jsonl"), str(it / "pairs.jsonl")))
            sha256 = {str(it / "pairs.jsonl"): file_sha256(str(it / "pairs.jsonl"))}
            checkpoint(
                it / "checkpoint",
                str(k) * 64,
                {
                    "stage": "dpo",
                    "arguments": {"epochs": 1, "dtype": "float32"},
                    "inputs": sha256,
                    "identities": {"model": str(k - 1) * 64, "reference": str(k - 1) * 64},
                    "counts": {"in": 4, "out": 3, "set aside: no room": 1},
                    "results": {"train_seconds": 3.0},
                    "seconds": 4000.0,
                },
            )
            rows = [
                {"step": i + 1, "loss": loss, "rewards/accuracies": 0.75}
                for i, loss in enumerate(LOSSES[name])
            ]
            (it / "checkpoint.log").mkdir()
            tiny.write_jsonl(it / "checkpoint.log/metrics.jsonl", rows)
        held_out = samples(it / "heldout.samples.jsonl", [[t] for t in texts], str(k) * 64)
        rank.main(rank.Args(ranker, held_out, str(it / "heldout.ranked.jsonl")))
        others = (
            {"start": "start", "previous": before} if k > 1 else {"start": "start"} if k else {}
        )
        for what, other in others.items():
            baseline = str(run / other / "heldout.samples.jsonl")
            out = str(it / f"against_{what}.json")
            compare.main(compare.Compare(held_out, baseline, ranker, out))
            kl = {"kl_per_token": 0.25 * k, "standard_error": 0.01, "tokens": 12}
            (it / f"kl_to_{what}.json").write_text(json.dumps(kl))
        before = name
    return run


def page_of(run, **flags) -> str:
    report.main(report.Args(str(run), **flags))
    return (run / "report.html").read_text()


class Page(HTMLParser):
    """Checks that elements nest; keeps the answers, the texts, and what would be fetched."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.fetched, self.answers, self.scripts = [], [], [], "", 0
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        links = [v for k, v in attributes.items() if k in ("src", "href", "xlink:href")]
        self.fetched += [link for link in links if not link.startswith("#")]
        self.scripts += tag == "script"
        if tag not in ("meta", "input", "br"):
            self.open.append((tag, attributes))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_data(self, text):
        if self.open and self.open[-1][1].get("id") == "answers":
            self.answers += text
        elif self.open and self.open[-1][0] not in ("script", "style"):
            self.texts.append(text.strip())


def test_the_page_is_whole_needs_no_network_and_shows_all_answers(run):
    page = Page(page_of(run))
    assert page.fetched == [] and page.scripts == 2
    content = json.loads(page.answers)
    assert [model["name"] for model in content["models"]] == list(MODELS)
    assert [p["prompt"] for p in content["prompts"]] == PROMPTS
    for i, texts in enumerate(MODELS.values()):
        assert [p["answers"][i]["text"] for p in content["prompts"]] == texts
    first = content["prompts"][0]["answers"]
    assert [a["won"] for a in first] == [None, 1.0, 1.0]
    assert [a["score"] for a in first] == [1.0, 4.0, 6.0]
    assert [a["finished"] for a in content["prompts"][2]["answers"]] == [False, True, True]
    for text in (
        "SEED 0, ranker <r>, dpo.beta 0.1",
        "1 h 6 min",
        "1 set aside: no room",
        "letters",
    ):
        assert any(text in t for t in page.texts), text


def test_the_table_has_the_figures_of_the_files(run, capsys):
    rows = tables.iterations(gather.models(str(run)))
    start, first, second = rows
    assert start["won against start"] == "–" == start["KL to start"]
    assert first["won against start"].startswith("87.5% [")  # three wins and a tie
    assert first["won against previous"] == first["won against start"]
    assert second["won against previous"].startswith("50.0% [")  # won, lost, tied, lost
    assert (first["KL to start"], second["KL to previous"]) == ("0.250", "0.500")
    assert (first["DPO loss"], second["DPO accuracy"]) == ("0.600", "75%")
    assert (start["finished"], first["finished"], start["distinct"]) == ("50%", "100%", "100%")
    report.main(report.Args(str(run), terms=True))
    shown = capsys.readouterr().out
    assert all(cell in shown for row in rows for cell in row.values())
    assert "letters" in shown and "best so far: iteration_" in shown
    assert shown.startswith("small, sample in bfloat16, dpo in float32:\n")
    nodes = [node for node in graph.read(str(run)) if node.path.endswith("samples.jsonl")]
    assert tables.computed_in(nodes) == "computed in bfloat16" and not tables.computed_in([])


def test_lineage_says_what_was_made_from_what_and_what_changed_since(run, tmp_path):
    nodes = {node.path: node for node in graph.read(str(run))}
    names = {path: {parent.path for parent in node.parents} for path, node in nodes.items()}
    assert names["iteration_2/checkpoint"] == {"iteration_2/pairs.jsonl", "iteration_1/checkpoint"}
    assert names["iteration_2/pairs.jsonl"] == {"iteration_2/ranked.jsonl"}
    assert names["iteration_2/ranked.jsonl"] == {"iteration_2/samples.jsonl", "ranker"}
    assert "iteration_1/checkpoint" in names["iteration_2/samples.jsonl"]
    assert names["iteration_2/against_previous.json"] == {
        "iteration_1/heldout.samples.jsonl",
        "iteration_2/heldout.samples.jsonl",
        "ranker",
    }
    order = list(nodes)
    assert all(order.index(p) < order.index(path) for path, of in names.items() for p in of)
    assert not any(node.changed for node in nodes.values())
    edited = tmp_path / "edited"
    shutil.copytree(run, edited)
    with open(edited / "iteration_1/pairs.jsonl", "a") as file:
        file.write("\n")
    changed = [node for node in graph.read(str(edited)) if node.changed]
    assert [node.path for node in changed] == ["iteration_1/pairs.jsonl"]


def test_a_file_outside_the_run_may_be_called_as_the_one_that_was_made_of_it(run, tmp_path):
    copied, mine = tmp_path / "small", tmp_path / "recipes" / "small" / "heldout.jsonl"
    shutil.copytree(run, copied)
    mine.parent.mkdir(parents=True)
    mine.write_text("{}\n")
    inputs = {"prompts": an_input(str(mine))}
    output = Output.open(str(copied / "heldout.jsonl"), Manifest("prompts", {}, inputs, {}))
    output.write({"prompt_id": "a", "prompt": "hi"})
    output.finish(["a"], Counter({"in": 1}))
    nodes = {node.path: node for node in graph.read(str(copied))}
    assert [parent.path for parent in nodes["heldout.jsonl"].parents] == [str(mine)]
    assert not nodes["heldout.jsonl"].changed


def test_a_run_that_has_just_begun_has_a_page_and_says_what_is_missing(run, tmp_path):
    begun = tmp_path / "begun"
    shutil.copytree(run / "start", begun / "start")
    page = Page(page_of(begun))
    assert "Nothing is trained yet." in page.texts
    assert len(json.loads(page.answers)["models"]) == 1
    shutil.copytree(run / "iteration_1", begun / "iteration_1")
    (begun / "iteration_1/heldout.ranked.jsonl").unlink()  # stopped before it was ranked
    (begun / "iteration_1/against_start.json").unlink()
    page = Page(page_of(begun))
    answers = json.loads(page.answers)["prompts"][0]["answers"]
    assert answers[1]["text"] == "abcd" and answers[1]["score"] is None is answers[1]["won"]
    (empty := tmp_path / "empty" / "start").mkdir(parents=True)
    assert "No model has answers" in page_of(empty.parent)


def test_fewer_answers_are_shown_and_said_and_what_is_no_run_is_refused(run, tmp_path, capsys):
    page = Page(page_of(run, answers=1))
    assert len(json.loads(page.answers)["prompts"]) == 1
    assert any(re.match("1 of 4 held-out prompts", text) for text in page.texts)
    assert run_main(report.main, report.Args, [str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err
    for scheme in ("s3", "https", "file"):
        assert run_main(report.main, report.Args, [f"{scheme}://b/runs/a"]) == 2
        assert f"{scheme}:// is not supported" in capsys.readouterr().err


def test_a_page_takes_the_place_of_a_page_and_of_nothing_else(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    for _ in range(2):
        assert run_main(report.main, report.Args, [str(run), "--out", str(page)]) == 0
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<!doctype html>\nmine")
    os.mkfifo(tmp_path / "pipe")
    places = (thesis, tmp_path, f"{tmp_path}/new/", tmp_path / "pipe", "/dev/null", "file:///x")
    capsys.readouterr()
    for place in map(str, (*places, run / "iteration_1/pairs.jsonl")):
        assert run_main(report.main, report.Args, [str(run), "--out", place]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and place in error
    assert thesis.read_text().endswith("mine") and (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device() and tiny.read_jsonl(run / "iteration_1/pairs.jsonl")


@pytest.mark.parametrize(
    "spoilt",
    [b'{"step": 3, "lo', b'{"step": 3, "lo\n', b"\0" * 40, b"\xff\n", b"[" * 100_000, b"\n"],
)
@pytest.mark.parametrize("where", ["start", "end"])
def test_a_metrics_line_that_a_kill_spoilt_is_left_out(run, tmp_path, spoilt, where):
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    file = killed / "iteration_2/checkpoint.log/metrics.jsonl"
    kept = file.read_bytes()
    file.write_bytes(kept + spoilt if where == "end" else spoilt.rstrip(b"\n") + b"\n" + kept)
    assert [len(model.metrics) for model in gather.models(str(killed))] == [0, 2, 2]
    page_of(killed)


def test_pairs_of_others_need_no_indices(run, tmp_path):
    others = tmp_path / "others"
    shutil.copytree(run, others)
    file = others / "iteration_1/pairs.jsonl"
    rows = tiny.read_jsonl(file)
    kept = ("prompt_id", "prompt", "chosen", "rejected")
    tiny.write_jsonl(file, [{name: row[name] for name in kept} for row in rows])
    (trained, *_) = gather.read(str(others)).trained
    assert len(trained.pairs["chosen_characters"]) == len(rows)
    page_of(others)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "\0"])
@pytest.mark.parametrize("name", ["settings.json", "iteration_2/against_start.json"])
def test_a_damaged_file_of_a_run_is_named(run, tmp_path, capsys, name, content):
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / name).write_text(content)
    assert run_main(report.main, report.Args, [str(damaged)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error


def test_a_run_is_ready_where_the_ranker_opens_and_the_disk_has_room(tmp_path, capsys):
    checkpoint(tmp_path / "start/checkpoint", "0" * 64, {})
    (tmp_path / "reward.py").write_text("def reward(prompt, responses):\n    return []\n")
    argv = [str(tmp_path), "--ranker", f"{tmp_path}/reward.py:reward"]
    assert run_main(ready.main, ready.Args, argv) == 0
    assert "disk: up to 0.0 GB will be written" in capsys.readouterr().out
    assert run_main(ready.main, ready.Args, [*argv[:-1], f"{tmp_path}/reward.py:other"]) == 2
    content = {"identity": "", "parameters": 10**15, "origin": {}}
    (tmp_path / "start/checkpoint/manifest.json").write_text(json.dumps(content))
    assert run_main(ready.main, ready.Args, argv) == 2
    assert "make room" in capsys.readouterr().err


def test_a_pairwise_ranker_gives_win_rates_and_no_rewards(run, tmp_path):
    pairwise = tmp_path / "pairwise"
    shutil.copytree(run, pairwise)
    for file in pairwise.glob("*/heldout.ranked.jsonl"):  # one answer is compared with none
        rows = [row | {"scores": [0.0], "comparisons": [[0.0]]} for row in tiny.read_jsonl(file)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = tables.iterations(gather.models(str(pairwise)))
    assert "reward" not in rows[0] and rows[1]["won against start"].startswith("87.5%")
    content = json.loads(Page(page_of(pairwise)).answers)
    assert content["prompts"][0]["answers"][0]["score"] is None


def test_a_models_reward_has_the_interval_of_a_mean():
    rows = [{"scores": [score], "responses": []} for score in (0.0, 1.0, 1.0, 0.0)]
    mean, half = gather.Model("m", rows, {}, {}, []).reward()
    assert mean == 0.5
    assert half == pytest.approx(1.96 * np.std([0, 1, 1, 0], ddof=1) / 2, abs=1e-3)
