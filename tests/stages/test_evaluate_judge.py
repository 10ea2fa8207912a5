"""The judge, against a server on this machine that speaks OpenAI's protocol."""

import email.utils
import gc
import importlib.metadata
import json
import math
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stages.evaluate import judge
from stages.files.output import Output, read_manifest
from tests.stages.test_evaluate import error_line, outputs, run

# In the form of alpaca_eval's own, which is read from the package where it is installed.
TEMPLATE = """<|im_start|>system
You judge.
<|im_end|>
<|im_start|>user
{ "instruction": \"\"\"{instruction}\"\"\" }
m: \"\"\"{output_1}\"\"\"
M: \"\"\"{output_2}\"\"\"
<|im_end|>"""
OURS = {f"Question {i}?": f"our {i} {'x' * i}" for i in range(8)}
THEIRS = {f"Question {i}?": f"their {i} {'x' * (7 - i)}" for i in range(8)}


def logprobs(first: str, second: str) -> dict[str, float]:
    """A judge that likes length, whichever comes first."""
    first_wins = 1 / (1 + math.exp((len(second) - len(first)) / 4))
    return {"m": math.log(0.9 * first_wins), "M": math.log(0.9 * (1 - first_wins)), "The": -2.4}


class Judge(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.asked.append((self.path, self.headers.get("Authorization"), body))
        status = server.statuses.pop(0) if server.statuses else 200
        status, again = status if isinstance(status, tuple) else (status, None)
        user = body["messages"][-1]["content"]
        first, second = (user.split(f'{name}: """')[1].split('"""')[0] for name in ("m", "M"))
        top = [{"token": t, "logprob": p} for t, p in server.logprobs(first, second).items()]
        content = [{"token": top[0]["token"], "logprob": top[0]["logprob"], "top_logprobs": top}]
        choice = {
            "index": 0,
            "finish_reason": "length",
            "logprobs": {"content": content},
            "message": {"role": "assistant", "content": top[0]["token"]},
        }
        usage = {"prompt_tokens": 99, "completion_tokens": 1, "total_tokens": 100}
        reply = {"object": "chat.completion", "choices": [choice], "usage": usage}
        if status != 200:
            reply = {"error": {"message": f"no: {status}", "type": "x"}}
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if again is not None:
            self.send_header("Retry-After", again)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A stand-in judge, and a package alpaca_eval that holds a prompt where the real one does."""
    site = tmp_path / "site"
    (site / "alpaca_eval-0.6.6.dist-info").mkdir(parents=True)
    (site / "alpaca_eval-0.6.6.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: alpaca_eval\nVersion: 0.6.6\n"
    )
    (site / "alpaca_eval" / Path(judge.PROMPT).parent).mkdir(parents=True)
    (site / "alpaca_eval" / judge.PROMPT).write_text(TEMPLATE)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setattr(judge, "FIRST_PAUSE", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.asked, server.statuses, server.logprobs = [], [], logprobs
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, tmp_path, *more) -> int:
    a = outputs(tmp_path / "a.json", OURS, "ours")
    b = outputs(tmp_path / "b.json", THEIRS, "theirs")
    return run(
        "judge",
        "--outputs",
        a,
        "--reference",
        b,
        "--out",
        tmp_path / "annotations.json",
        "--endpoint",
        f"http://127.0.0.1:{server.server_port}/v1",
        *more,
    )


def test_annotations_hold_the_judges_preference_whatever_stood_first(server, tmp_path):
    assert ask(server, tmp_path) == 0
    rows = json.loads((tmp_path / "annotations.json").read_text())
    assert [row["instruction"] for row in rows] == list(OURS)
    for row in rows:
        ours, theirs = OURS[row["instruction"]], THEIRS[row["instruction"]]
        assert (row["output_2"], row["output_1"]) == (ours, theirs)
        assert (row["generator_2"], row["generator_1"]) == ("ours", "theirs")
        wanted = 1 + 1 / (1 + math.exp((len(theirs) - len(ours)) / 4))
        assert row["preference"] == pytest.approx(wanted, abs=1e-12)
        assert row["price_per_example"] == pytest.approx(100 * 10 / 1e6)
        assert row["raw_completion"]["message"]["role"] == "assistant"
    assert {row["annotator"] for row in rows} == {"weighted_alpaca_eval_gpt4_turbo"}
    switched = {key: judge.is_switched(key) for key in OURS}
    assert set(switched.values()) == {True, False}
    for path, key, body in server.asked:
        assert (path, key) == ("/v1/chat/completions", "Bearer sk-test")
        assert (body["max_tokens"], body["temperature"], body["top_logprobs"]) == (1, 1, 5)
        assert body["messages"][0] == {"role": "system", "content": "You judge."}
        user = body["messages"][1]["content"]
        instruction = user.split('"instruction": """')[1].split('"""')[0]
        first = OURS[instruction] if switched[instruction] else THEIRS[instruction]
        assert f'm: """{first}"""' in user
    results = read_manifest(str(tmp_path / "annotations.json")).results
    assert (results["requests"], results["tokens"]) == (8, 800)
    assert results["price"] == pytest.approx(0.008)
    assert (
        run(
            "score",
            "--annotations",
            tmp_path / "annotations.json",
            "--out",
            tmp_path / "score.json",
        )
        == 0
    )
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["win_rate"] == pytest.approx(results["win_rate"])


def test_failed_requests_are_tried_again(server, tmp_path):
    server.statuses = [429, 500, 503, 429]
    assert ask(server, tmp_path) == 0
    assert len(server.asked) == 12


def test_the_server_says_when_to_ask_again(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "FIRST_PAUSE", 60)  # what it would wait by itself
    soon = email.utils.formatdate(time.time() + 1, usegmt=True)
    server.statuses = [(429, "0.3"), (503, soon), (429, "0")]
    start = time.monotonic()
    assert ask(server, tmp_path, "--parallel", 1) == 0
    assert len(server.asked) == 11 and 0.3 <= time.monotonic() - start < 30
    server.statuses = [(429, "86400")]  # longer than a run should sit there
    (tmp_path / "annotations.json").unlink()
    assert ask(server, tmp_path, "--parallel", 1) == 2
    assert "Retry-After: 86400 seconds" in error_line(capsys)
    assert len(server.asked) == 12


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_no_request_is_paid_for_after_a_failure(server, tmp_path, monkeypatch, error):
    """Whatever is raised, the queued requests are not sent, and what was sent already is kept."""
    written = []

    def failing(self, row, real=Output.write):
        if len(written) == 1:
            written.append(None)
            raise error("of another kind")
        real(self, row)
        written.append(row["prompt_id"])

    monkeypatch.setattr(Output, "write", failing)
    monkeypatch.setattr(judge, "FIRST_PAUSE", 60)
    server.statuses = [200, 200, 429]  # this one waits for its turn when the failure comes
    start = time.monotonic()
    if error is KeyboardInterrupt:
        assert ask(server, tmp_path, "--parallel", 2) == 75
    else:
        with pytest.raises(error):
            ask(server, tmp_path, "--parallel", 2)
    assert time.monotonic() - start < 30
    asked = len(server.asked)
    assert asked <= 4  # of 8
    time.sleep(0.2)
    assert len(server.asked) == asked
    answered = sum(status == 200 for status in [200, 200, 429, 200][:asked])
    assert len([key for key in written if key]) >= answered - 1  # all but the one that failed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_once_although_the_server_says_wait(server, tmp_path, number):
    server.statuses = [200, *[(429, "500")] * 9]
    threading.Timer(1.5, os.kill, (os.getpid(), number)).start()
    start = time.monotonic()
    assert ask(server, tmp_path, "--parallel", 2) == 75
    assert time.monotonic() - start < 20
    asked = len(server.asked)
    assert asked == 3  # one is answered, and two wait for their turn
    assert len((tmp_path / "annotations.json.partial").read_text().splitlines()) == 1
    server.statuses = []
    gc.collect()
    assert ask(server, tmp_path) == 0 and len(server.asked) == asked + 7


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parallel", 0], "--parallel is 0"),
        (["--timeout", "nan"], "--timeout is nan"),
        (["--price-per-million", "inf"], "--price-per-million is inf"),
        (["--endpoint", "api.example.com/v1"], "must begin with http"),
        (["--response", -1], "--response is -1"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_before_a_request(
    server, tmp_path, capsys, flags, words
):
    assert ask(server, tmp_path, *flags) == 2
    assert words in error_line(capsys) and not server.asked


@pytest.mark.parametrize("logprob", [None, "high", float("nan"), 1e6])
def test_a_reply_whose_log_prob_is_no_number_is_told_in_one_line(server, tmp_path, capsys, logprob):
    server.logprobs = lambda first, second: {"m": logprob}
    assert ask(server, tmp_path, "--parallel", 1) == 2
    assert "log-probs" in error_line(capsys)


def test_what_was_judged_before_a_failure_is_not_asked_again(server, tmp_path, capsys):
    server.statuses = [200, 200, 200, 401]
    assert ask(server, tmp_path, "--parallel", 1) == 2
    line = error_line(capsys)
    assert "HTTP 401" in line and "goes on" in line
    assert not (tmp_path / "annotations.json").exists()
    before = len(server.asked)
    kept = len((tmp_path / "annotations.json.partial").read_text().splitlines())
    assert kept >= 3
    gc.collect()  # the failed run's hold on its file; a process of its own ends with it
    assert ask(server, tmp_path) == 0
    assert len(server.asked) - before == 8 - kept
    assert len(json.loads((tmp_path / "annotations.json").read_text())) == 8


def test_equal_answers_tie_unasked_and_a_reply_without_m_has_no_preference(server, tmp_path):
    server.logprobs = lambda first, second: {"Both": -0.1}
    outputs(tmp_path / "same.json", OURS | {"Question 1?": "z", "Question 2?": "y"})
    assert ask(server, tmp_path, "--reference", tmp_path / "same.json") == 0
    rows = json.loads((tmp_path / "annotations.json").read_text())
    assert [row["preference"] for row in rows] == [1.5, None, None] + [1.5] * 5
    assert len(server.asked) == 2
    counts = read_manifest(str(tmp_path / "annotations.json")).counts
    assert counts["without a preference (the reply began with neither m nor M)"] == 2


def test_a_missing_package_or_a_server_without_logprobs_is_told_in_one_line(
    server, tmp_path, monkeypatch, capsys
):
    server.logprobs = lambda first, second: {}
    Judge.do_POST, whole = lambda self: bare_reply(self), Judge.do_POST
    try:
        assert ask(server, tmp_path, "--parallel", 1) == 2
    finally:
        Judge.do_POST = whole
    assert "log-probs" in error_line(capsys)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert ask(server, tmp_path) == 2
    assert "pip install alpaca_eval" in error_line(capsys)


def bare_reply(handler):
    data = json.dumps({"choices": [{"message": {"content": "m"}, "logprobs": None}]}).encode()
    handler.rfile.read(int(handler.headers["Content-Length"]))
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def test_the_preference_is_alpaca_evals_log_prob_parser(data):
    """What the leaderboard's judge replied, and what alpaca_eval made of it: parser and order."""
    for model in ("claude-2", "vicuna-7b"):
        rows = json.loads((data / f"alpaca_eval/annotations_{model}.json").read_text())
        for row in rows:
            if row["raw_completion"] is None:
                continue
            found = judge.preference({"choices": [row["raw_completion"]]})
            if judge.is_switched(row["instruction"]):
                found = 3 - found
            assert found == pytest.approx(row["preference"], abs=1e-9)


def test_the_official_command_names_the_files():
    command = judge.official_command("a b.json", "ref.json")
    assert "--model_outputs 'a b.json' --reference_outputs ref.json" in command
