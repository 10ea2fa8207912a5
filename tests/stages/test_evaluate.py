"""Win rates against AlpacaEval's leaderboard, comparisons, scores, overlap: what needs no model."""

import csv
import json
import random
from collections import Counter

import numpy as np
import pytest

from sharding.errors import UserError
from stages.evaluate import __main__ as evaluate
from stages.evaluate import overlap, winrates
from stages.files import benchmarks
from stages.files.output import Output, read_manifest
from stages.files.paths import text_sha256
from stages.files.run import Stopped, run_main
from tests import tiny, tiny_pairrm
from tests.stages.test_rows import ASKED_APART, NOT_APART

LENGTH = "def reward(prompt, responses): return [float(len(r)) for r in responses]\n"


def run(*argv) -> int:
    return run_main(evaluate.main, evaluate.Command, [str(word) for word in argv])


def outputs(path, texts: dict[str, str], generator="m", **more):
    rows = [
        {"instruction": key, "output": text, "generator": generator, "dataset": "d", **more}
        for key, text in texts.items()
    ]
    path.write_text(json.dumps(rows))
    return path


def error_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


# ------------------------------------------------------------------------------- statistics


def test_ties_count_half_and_the_error_is_that_of_a_mean():
    found = winrates.summary(np.array([1, 1, 0.5, 0]))
    assert (found.wins, found.ties, found.losses, found.n) == (2, 1, 1, 4)
    assert found.win_rate == found.discrete_win_rate == 0.625
    assert found.standard_error == pytest.approx(np.sqrt(0.6875 / 3 / 4))
    assert winrates.summary(np.array([0.3])).standard_error is None


def test_the_discrete_win_rate_counts_preferences_by_side():
    found = winrates.summary(np.array([0.51, 0.9, 0.49, 0.5]))
    assert found.discrete_win_rate == 0.625
    assert found.win_rate == pytest.approx(0.6)


def test_the_bootstrap_interval_is_seeded_and_as_wide_as_the_normal_one():
    values = np.random.default_rng(0).random(400)
    low, high = winrates.bootstrap_interval(values, seed=1)
    assert (low, high) == winrates.bootstrap_interval(values, seed=1)
    error = winrates.standard_error(values)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


@pytest.mark.parametrize(
    ("preferences", "lengths", "why"),
    [
        (np.tile([0.0, 1.0], 5), np.arange(10), "20 are needed"),
        (np.tile([0.0, 1.0], 20), np.full(40, 7), "the same"),
        (np.ones(40), np.arange(40), "same way"),
    ],
)
def test_a_length_controlled_win_rate_that_cannot_be_estimated_says_why(preferences, lengths, why):
    found = winrates.length_controlled(preferences, lengths, np.zeros(len(lengths)))
    assert found.win_rate is None and why in found.why


def test_length_control_takes_away_what_length_alone_explains():
    rng = np.random.default_rng(0)
    lengths = rng.integers(500, 1500, 600)
    baseline = rng.integers(300, 1300, 600)
    differences = baseline - lengths
    chance = 1 / (1 + np.exp(3 * np.tanh(differences / differences.std(ddof=1)) + 0.4))
    preferences = (rng.random(600) < chance).astype(float)
    found = winrates.length_controlled(preferences, lengths, baseline)
    assert preferences.mean() > 0.5  # longer answers won
    assert found.win_rate == pytest.approx(1 / (1 + np.exp(0.4)), abs=0.05)


# ------------------------------------------------------------- annotations to the leaderboard


def leaderboard_row(data, model: str) -> dict:
    with open(data / "alpaca_eval" / "leaderboard.csv") as file:
        return next(row for row in csv.DictReader(file) if row[""] == model)


# The rates that alpaca_eval 0.6.6 itself fits without df_gamed.csv ("length_controlled_noreg").
NOREG = {"claude-2": 27.0421752082439, "vicuna-7b": 5.282471694658269}


@pytest.mark.parametrize("model", ["claude-2", "vicuna-7b"])
def test_score_reproduces_the_leaderboards_row(data, tmp_path, model):
    folder = data / "alpaca_eval"
    known = ("--difficulty", folder / "instruction_difficulty.json")
    out = ("--out", tmp_path / "score.json")
    assert run("score", "--annotations", folder / f"annotations_{model}.json", *known, *out) == 0
    found = json.loads((tmp_path / "score.json").read_text())
    wanted = leaderboard_row(data, model)
    for name in ("win_rate", "standard_error", "discrete_win_rate"):
        assert found[name] == pytest.approx(float(wanted[name]), abs=1e-9)
    for name in ("avg_length", "n_wins", "n_wins_base", "n_draws", "n_total"):
        assert found[name] == int(wanted[name])
    # Without df_gamed.csv, which is on the hub alone.
    found_lc, wanted_lc = found["length_controlled_winrate"], wanted["length_controlled_winrate"]
    assert found_lc == pytest.approx(float(wanted_lc), abs=1.5)
    assert found_lc == pytest.approx(NOREG[model], abs=1e-4)
    assert found["interval"][0] < found["win_rate"] < found["interval"][1]


def test_score_leaves_out_rows_without_a_preference_and_counts_them(tmp_path):
    rows = [
        {
            "instruction": f"i{i}",
            "output_1": "aa",
            "output_2": "b" * i,
            "generator_1": "r",
            "generator_2": "m",
            "preference": p,
        }
        for i, p in enumerate([2, 1, 0, None, 1.75])
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert run("score", "--annotations", tmp_path / "a.json", "--out", tmp_path / "s.json") == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["win_rate"] == pytest.approx(100 * (1 + 0 + 0.5 + 0.75) / 4)
    assert found["avg_length"] == 2 and found["n_total"] == 4 and found["n_draws"] == 1
    assert found["length_controlled_winrate"] is None and "needed" in found["why"]
    manifest = read_manifest(str(tmp_path / "s.json"))
    assert manifest.counts == {"in": 5, "out": 4, "set aside: no preference": 1}


def test_the_gamed_rows_of_the_hub_pull_the_fit(tmp_path):
    rng = random.Random(0)
    rows = [
        {
            "instruction": f"i{i}",
            "output_1": "a" * rng.randrange(50, 90),
            "generator_1": "r",
            "output_2": "b" * rng.randrange(60, 99),
            "generator_2": "m",
            "preference": 1 + rng.random(),
        }
        for i in range(60)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "d.csv").write_text(
        ",instruction_difficulty\n" + "".join(f"{i},{rng.gauss(0, 1)}\n" for i in range(60))
    )
    gamed = "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline,model\n"
    for i in range(120):
        longer = rng.gauss(0, 2)
        gamed += f"{i},{1 / (1 + np.exp(2 * np.tanh(longer)))},{longer},0.1,False,concise\n"
    (tmp_path / "g.csv").write_text(gamed)
    common = ("--annotations", tmp_path / "a.json", "--difficulty", tmp_path / "d.csv")
    assert run("score", *common, "--out", tmp_path / "without.json") == 0
    assert run("score", *common, "--gamed", tmp_path / "g.csv", "--out", tmp_path / "g.json") == 0
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("without", "g"))
    assert (one["length_control"], other["length_control"]) == ("noreg", "v1")
    assert one["length_controlled_winrate"] != other["length_controlled_winrate"]


# ------------------------------------------------------------------------------- comparisons


def test_compare_by_a_reward_counts_wins_ties_and_losses(tmp_path, capsys):
    (tmp_path / "reward.py").write_text(LENGTH)
    a = outputs(tmp_path / "a.json", {"one": "long answer", "two": "x", "three": "same"}, "A")
    b = outputs(tmp_path / "b.json", {"three": "eman", "one": "short", "two": "xx"}, "B")
    command = (
        "compare",
        "--outputs",
        a,
        "--baseline",
        b,
        "--ranker",
        f"{tmp_path}/reward.py:reward",
        "--out",
        tmp_path / "c.json",
    )
    assert run(*command) == 0
    found = json.loads((tmp_path / "c.json").read_text())
    assert (found["wins"], found["ties"], found["losses"], found["win_rate"]) == (1, 1, 1, 0.5)
    assert found["mean_length"] == pytest.approx([16 / 3, 11 / 3])
    assert found["length_controlled_win_rate"] is None and found["why"]
    assert found["generators"] == ["A", "B"]
    assert [
        (row["instruction"], row["preference"], row["lengths"]) for row in found["per_instruction"]
    ] == [("one", 1.0, [11, 5]), ("two", 0.0, [1, 2]), ("three", 0.5, [4, 4])]
    manifest = read_manifest(str(tmp_path / "c.json"))
    assert manifest.stage == "evaluate compare" and manifest.counts == {"in": 3, "out": 3}
    assert not list(tmp_path.glob("*.partial*"))
    capsys.readouterr()
    assert run(*command) == 0
    assert "finished already" in capsys.readouterr().out
    assert run(*command, "--seed", 1) == 2
    assert "other arguments" in error_line(capsys)


def test_compare_reads_samples_and_gives_the_reward_its_finish_reasons(tmp_path):
    (tmp_path / "reward.py").write_text(
        "def reward(p, r, finish_reasons): return [float(x == 'stop') for x in finish_reasons]\n"
    )
    responses = [{"text": "a", "finish_reason": "length"}, {"text": "b", "finish_reason": "stop"}]
    row = {"prompt_id": "p", "prompt": "Why?", "responses": responses}
    tiny.write_jsonl(tmp_path / "s.jsonl", [row])
    b = outputs(tmp_path / "b.json", {"Why?": "c"}, finish_reason="length")
    for response, preference in ((0, 0.5), (1, 1.0)):
        out = tmp_path / f"{response}.json"
        files = ("--outputs", tmp_path / "s.jsonl", "--baseline", b, "--response", response)
        ranker = ("--ranker", f"{tmp_path}/reward.py:reward")
        assert run("compare", *files, *ranker, "--out", out) == 0
        assert json.loads(out.read_text())["win_rate"] == preference


def test_instructions_that_one_file_alone_answers_are_refused_or_counted(tmp_path, capsys):
    (tmp_path / "reward.py").write_text(LENGTH)
    a = outputs(tmp_path / "a.json", {"one": "x", "two": "yy"})
    b = outputs(tmp_path / "b.json", {"two": "y", "three": "z"})
    command = (
        "compare",
        "--outputs",
        a,
        "--baseline",
        b,
        "--ranker",
        f"{tmp_path}/reward.py:reward",
        "--out",
        tmp_path / "c.json",
    )
    assert run(*command) == 2
    assert "--common-only" in error_line(capsys)
    assert run(*command, "--common-only") == 0
    assert read_manifest(str(tmp_path / "c.json")).counts == {
        "in": 3,
        "out": 1,
        "set aside: answered in --outputs alone": 1,
        "set aside: answered in --baseline alone": 1,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"instruction": "a"}]', "'output' is missing"),
        ('[{"instruction": "a", "output": "x"}, {"instruction": "a", "output": "y"}]', "above"),
        ("[1]", "not an object"),
        ("[", "not JSON"),
        ('{"prompt_id": "p", "prompt": "a", "responses": []}', "no response 0"),
    ],
)
def test_a_wrong_file_of_answers_is_told_in_one_line(tmp_path, capsys, text, words):
    (tmp_path / "a.json").write_text(text)
    assert (
        run(
            "compare",
            "--outputs",
            tmp_path / "a.json",
            "--baseline",
            tmp_path / "a.json",
            "--ranker",
            "x.py:y",
            "--out",
            tmp_path / "c.json",
        )
        == 2
    )
    assert words in error_line(capsys)


def test_compare_by_pairrm_takes_both_orders_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    tiny_pairrm.write_pairrm(tmp_path / "pairrm")
    keys = [
        f"Question {i}?" for i in range(4)
    ]  # all of a length, so that few programs are compiled
    a = outputs(tmp_path / "a.json", dict(zip(keys, ["Red.", "Two.", "Sun.", "Yes."])))
    b = outputs(tmp_path / "b.json", dict(zip(keys, ["Ice.", "Low.", "Hot.", "No…."])))
    command = ("compare", "--outputs", a, "--baseline", b, "--ranker", tmp_path / "pairrm")
    assert run(*command, "--out", tmp_path / "ab.json") == 0
    found = json.loads((tmp_path / "ab.json").read_text())
    assert 0 <= found["swap_consistency"] <= 1
    # The same pairs the other way round: every comparison is made in both orders anyway.
    assert (
        run("compare", "--outputs", b, "--baseline", a, *command[5:], "--out", tmp_path / "ba.json")
        == 0
    )
    other = json.loads((tmp_path / "ba.json").read_text())
    for one, two in zip(found["per_instruction"], other["per_instruction"]):
        assert one["margin"] == pytest.approx(-two["margin"], abs=1e-5)
        assert one["preference"] == 1 - two["preference"]

    written = []
    write = Output.write

    def stopping(self, row):
        if len(written) == 2:
            raise Stopped("stopped")
        write(self, row)
        written.append(row["prompt_id"])

    monkeypatch.setattr(Output, "write", stopping)
    assert run(*command, "--out", tmp_path / "again.json") == 75
    monkeypatch.undo()
    assert len((tmp_path / "again.json.partial").read_text().splitlines()) == 2
    assert run(*command, "--out", tmp_path / "again.json") == 0
    again = json.loads((tmp_path / "again.json").read_text())
    for one, two in zip(found["per_instruction"], again["per_instruction"]):
        assert one == two | {"margin": pytest.approx(two["margin"], abs=1e-5)}


# ------------------------------------------------------------------------------- benchmarks


def test_benchmarks_are_read_in_the_forms_they_come_in(tmp_path):
    row = {"instruction": "A?", "output": "never read", "generator": "g", "dataset": "koala"}
    (tmp_path / "alpaca_eval.json").write_text(json.dumps([row]))
    counts = Counter()
    path = benchmarks.local_file(str(tmp_path))
    assert benchmarks.read_instructions(path, counts) == [
        {"prompt": "A?", "dataset": "koala", "prompt_id": text_sha256("A?")}
    ]
    mt_bench = [{"question_id": 81, "category": "writing", "turns": ["First.", "Second."]}]
    tiny.write_jsonl(tmp_path / "question.jsonl", mt_bench)
    assert benchmarks.read_instructions(str(tmp_path / "question.jsonl"), counts) == [
        {"prompt": "First.", "dataset": "writing", "prompt_id": "question 81"}
    ]
    assert counts == {"in": 2, "out": 1, "second turns not asked": 1}


def test_alpaca_eval_comes_from_the_hubs_cache(tmp_path, monkeypatch):
    folder = tmp_path / "datasets--tatsu-lab--alpaca_eval"
    (folder / "snapshots" / "c0ffee").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c0ffee")
    (folder / "snapshots" / "c0ffee" / "alpaca_eval.json").write_text("[]")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert benchmarks.local_file("alpaca_eval") == str(
        folder / "snapshots" / "c0ffee" / "alpaca_eval.json"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="download it elsewhere"):
        benchmarks.local_file("alpaca_eval")


def test_the_805_and_mt_bench_are_read_whole(data):
    counts = Counter()
    rows = benchmarks.read_instructions(str(data / "alpaca_eval/gpt4_1106_preview.json"), counts)
    assert len(rows) == 805 and len({row["prompt_id"] for row in rows}) == 805
    assert len(benchmarks.read_instructions(str(data / "prompts/mt_bench.jsonl"), counts)) == 80
    assert counts["second turns not asked"] == 80


def test_an_instruction_with_an_input_is_asked_with_it(tmp_path):
    joined = "Translate to French.\n\nGood morning"
    row = {"instruction": "Translate to French.", "input": "Good morning", "output": "Bonjour"}
    (tmp_path / "a.json").write_text(json.dumps([row, row | {"input": ""}]))
    rows = benchmarks.read_instructions(str(tmp_path / "a.json"), Counter())
    assert [row["prompt"] for row in rows] == [joined, "Translate to French."]
    assert [o.prompt for o in benchmarks.read_outputs(str(tmp_path / "a.json")).values()] == [
        joined,
        "Translate to French.",
    ]
    assert benchmarks.asked_texts(row, "here") == [joined]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        *ASKED_APART,
        ({"instruction": "Sum it up.", "context": "A text."}, "context"),
        ({"instruction": "Sum it up.", "input": "A text.", "system": "Be brief."}, "system"),
        ({"turns": ["Sum it up.", "Shorter."], "documents": ["A text."]}, "documents"),
    ],
)
def test_a_field_of_the_task_that_is_not_asked_is_refused_by_name(tmp_path, capsys, row, name):
    (tmp_path / "a.json").write_text(json.dumps([row]))
    message = f"item 0: field '{name}' is part of the task"
    with pytest.raises(UserError, match=message):
        benchmarks.read_instructions(str(tmp_path / "a.json"), Counter())
    files = (tmp_path / "a.json", tmp_path / "a.json")
    assert run("overlap", "--train", *files, "--out", tmp_path / "o.json") == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("row", NOT_APART)
def test_a_field_of_the_task_that_is_asked_is_no_obstacle(tmp_path, row):
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert len(benchmarks.read_instructions(str(tmp_path / "a.json"), Counter())) == 1
    assert benchmarks.asked_texts(row, "here")


def test_mt_benchs_questions_may_come_without_ids(tmp_path):
    questions = [{"turns": [f"Question {i}?"]} for i in range(3)] + [
        {"turns": ["Named?"], "question_id": "q7"}
    ]
    tiny.write_jsonl(tmp_path / "question.jsonl", questions)
    rows = benchmarks.read_instructions(str(tmp_path / "question.jsonl"), Counter())
    wanted = [text_sha256(f"Question {i}?") for i in range(3)] + ["question q7"]
    assert [row["prompt_id"] for row in rows] == wanted
    tiny.write_jsonl(tmp_path / "question.jsonl", [{"turns": ["?"], "question_id": [1]}])
    with pytest.raises(UserError, match="line 1: field 'question_id' is list"):
        benchmarks.read_instructions(str(tmp_path / "question.jsonl"), Counter())


def test_a_row_of_samples_stays_one_whatever_other_fields_it_carries(tmp_path):
    row = {"prompt_id": "p", "prompt": "Why?", "instruction": "carried", "output": 1}
    tiny.write_jsonl(tmp_path / "s.jsonl", [row | {"responses": [{"text": "a"}]}])
    (output,) = benchmarks.read_outputs(str(tmp_path / "s.jsonl")).values()
    assert (output.key, output.text) == ("Why?", "a")


# ------------------------------------------------------------------- files that are not right

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "argv",
    [
        "compare --outputs {file} --baseline {file} --ranker {dir}/reward.py:reward",
        "score --annotations {file}",
        "score --annotations {good} --difficulty {file}",
        "score --annotations {good} --difficulty {good} --gamed {file}",
        "overlap --train {file} {file}",
        "outputs --checkpoint {dir} --benchmark {file}",
    ],
)
@pytest.mark.parametrize(
    "content",
    [DEEP, '{"prompt": ' + DEEP + "}", "", "\x00", '[{"instruction": 1e999, "output": 1e999}]'],
    ids=["deep", "deep-row", "empty", "zero", "infinite"],
)
def test_a_file_that_cannot_be_read_gets_one_line(tmp_path, capsys, argv, content):
    (tmp_path / "reward.py").write_text(LENGTH)
    (tmp_path / "bad.json").write_text(content)
    good = {"output_1": "a", "output_2": "b", "preference": 2, "instruction_difficulty": [0.0]}
    (tmp_path / "good.json").write_text(json.dumps([good]))
    names = {"file": tmp_path / "bad.json", "good": tmp_path / "good.json", "dir": tmp_path}
    words = argv.format(**names).split()
    assert run(*words, "--out", tmp_path / "out.json") == 2
    assert len(error_line(capsys)) < 1000
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "high"])
def test_difficulties_are_finite_numbers(tmp_path, capsys, value):
    row = {"output_1": "a", "output_2": "b", "preference": 2}
    (tmp_path / "a.json").write_text(json.dumps([row, row]))
    (tmp_path / "d.csv").write_text(f",instruction_difficulty\n0,1.5\n1,{value}\n")
    command = ("score", "--annotations", tmp_path / "a.json", "--difficulty", tmp_path / "d.csv")
    assert run(*command, "--out", tmp_path / "s.json") == 2
    assert "--difficulty" in error_line(capsys)


def test_inputs_in_other_roles_are_another_run(tmp_path, capsys):
    tiny.write_jsonl(tmp_path / "1.jsonl", [{"prompt": "One prompt of the first file"}])
    tiny.write_jsonl(tmp_path / "2.jsonl", [{"prompt": "Another prompt of the second"}])
    out = ("--out", tmp_path / "o.json")
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    assert run("overlap", "--train", one, "--benchmarks", two, *out) == 0
    assert run("overlap", "--train", two, "--benchmarks", one, *out) == 2
    assert "other arguments" in error_line(capsys)
    (tmp_path / "reward.py").write_text(LENGTH)
    a, b = outputs(tmp_path / "a.json", {"q": "x"}), outputs(tmp_path / "b.json", {"q": "yy"})
    ranker = ("--ranker", f"{tmp_path}/reward.py:reward", "--out", tmp_path / "c.json")
    assert run("compare", "--outputs", a, "--baseline", b, *ranker) == 0
    assert run("compare", "--outputs", b, "--baseline", a, *ranker) == 2
    assert "other arguments" in error_line(capsys)
    # The result never takes the place of what was compared.
    assert run("compare", "--outputs", a, "--baseline", b, *ranker[:2], "--out", b) == 2
    assert "is the input (baseline)" in error_line(capsys)
    assert json.loads(b.read_text())[0]["output"] == "yy"


# ---------------------------------------------------------------------------------- overlap


def test_ngrams_do_not_see_case_punctuation_or_width():
    assert overlap.ngrams("Ｗhat's UP, there?", 3) == overlap.ngrams("what s up there", 3)
    assert len(overlap.ngrams("a b c d", 3)) == 2
    # A short prompt is met by the same prompt alone, not by a longer one that holds it.
    assert overlap.ngrams("a b", 3).isdisjoint(overlap.ngrams("a b c d", 3))


def test_overlap_reports_benchmarks_and_slices(tmp_path):
    long = "tell me how the bridge over the river was built in those days"
    tiny.write_jsonl(tmp_path / "1.jsonl", [{"prompt": long + " please"}, {"prompt": "Hi there"}])
    tiny.write_jsonl(tmp_path / "2.jsonl", [{"prompt": "hi, there!"}, {"prompt": "Other"}])
    tiny.write_jsonl(
        tmp_path / "b.jsonl", [{"turns": [long.upper(), "Unseen"]}, {"turns": ["Hi There!!"]}]
    )
    assert (
        run(
            "overlap",
            "--train",
            tmp_path / "1.jsonl",
            tmp_path / "2.jsonl",
            "--benchmarks",
            tmp_path / "b.jsonl",
            "--n",
            5,
            "--out",
            tmp_path / "o.json",
        )
        == 0
    )
    reports = json.loads((tmp_path / "o.json").read_text())["reports"]
    found = [(r["prompts"], r["identical"], r["contaminated"], r["touched"]) for r in reports]
    # the benchmark in slice 1 and in slice 2; slice 1 in 2, and 2 in 1
    assert found == [(3, 1, 2, 2), (3, 1, 1, 1), (2, 1, 1, 1), (2, 1, 1, 1)]
    first = reports[0]["matches"][0]
    assert (first["share"], first["nearest"]) == (1.0, long + " please")
    assert read_manifest(str(tmp_path / "o.json")).results["reports"][0]["touched"] == 2


def test_alpaca_eval_and_an_ultrafeedback_sample_share_next_to_nothing(data, tmp_path):
    files = (
        "--train",
        data / "preferences/ultrafeedback_1000.jsonl",
        "--benchmarks",
        data / "alpaca_eval/gpt4_1106_preview.json",
    )
    assert run("overlap", *files, "--out", tmp_path / "o.json") == 0
    (report,) = json.loads((tmp_path / "o.json").read_text())["reports"]
    assert (report["prompts"], report["identical"], report["contaminated"]) == (805, 0, 0)
    assert report["touched"] == 3
