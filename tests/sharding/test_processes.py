"""How processes of one run end together: real ones, over CPU collectives."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from sharding import processes as sharding_processes
from sharding.processes import Flags
from tests.tiny import free_port, xla_flags

# Joins, says so, and does what WHAT says.
CODE = """
import os, sys, time
from sharding import processes
from sharding.errors import UserError
from stages.files import run

def main(args: processes.Flags):
    processes.start(args)
    print("there", file=sys.stderr, flush=True)
    what = os.environ["WHAT"]
    if what == "bug":
        raise RuntimeError("a bug")
    if what == "mistake":
        raise UserError("a mistake")
    if what == "writes":
        from tests.sharding.test_processes import OTHER_KEYS, OTHER_MESSAGES
        for number, text in enumerate(OTHER_MESSAGES):
            others = processes._others
            others.client.key_value_set_bytes(f"processes/{number + 2}", text)
            others.client.key_value_set_bytes("processes/1", text, allow_overwrite=True)
            time.sleep(0.1)
        for key in OTHER_KEYS:
            others.client.key_value_set(f"processes/{key}", '["host", 1, 0, "an end"]')
        time.sleep(1)
    if what == "sleep":
        time.sleep(100)
    if what == "busy":
        with run.stop_signal():
            time.sleep(100)
    if what == "stop":
        with run.stop_signal() as check:
            asked, from_all = [], processes.from_all
            processes.from_all = lambda value: (asked.append(value), from_all(value))[1]
            check, calls = processes.loop_check(check, run.STOPPED_TOGETHER), 0
            try:
                while True:
                    calls += 1
                    check()
                    time.sleep(0.002 + 0.001 * args.process_id)
            finally:
                print(f"{calls} calls, {len(asked)} questions", file=sys.stderr, flush=True)
    processes.wait()

sys.exit(run.run_main(main, processes.Flags, several=processes))
"""

# What a process never says, and keys that are none's.
OTHER_MESSAGES = [
    *(b"5", b"null", b"{}", b'"text"', b"[]", b"", b"[1", b"\xff\xfe", b"NaN", b"[" * 100_000),
    *(b'["host", 1, 0]', b'["host", 1, 0, "why", 1]', b'["host", 1, 0, null]', b'[1, 1, 0, ""]'),
    *(b'["host", "1", 0, ""]', b'["host", 1, "2", "an end"]', b'["host", true, 0, "an end"]'),
]
OTHER_KEYS = ["x", "-1", "99", "1/2", "01", "1.0", "²", " 1", "1 ", "None"]


@pytest.fixture
def begin(monkeypatch):
    monkeypatch.setenv("PROCESS_TIMEOUT", "40")
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
    running = []

    def begin(*what, processes=None):
        port = free_port()
        for me, word in enumerate(what):
            place = f"--coordinator localhost:{port} --processes {processes or len(what)}"
            running.append(
                subprocess.Popen(
                    [sys.executable, "-c", CODE, *place.split(), "--process-id", str(me)],
                    env=os.environ | {"WHAT": word},
                    text=True,
                    stderr=subprocess.PIPE,
                )
            )
        return running[-len(what) :]

    yield begin
    for process in running:
        process.kill()


def together(processes):
    for process in processes:
        while "there" not in (line := process.stderr.readline()):
            assert line, process.wait()
    return processes


def ends(processes, within: float):
    """(exit code, what it says last) of each."""
    start = time.monotonic()
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert time.monotonic() - start < within
    return [(p.returncode, (text.splitlines() or [""])[-1]) for p, text in zip(processes, said)]


def test_one_that_is_killed_is_named_by_all_others(begin):
    waits, victim, sleeps = together(begin("wait", "sleep", "sleep"))
    victim.kill()
    for code, line in ends([waits, sleeps], within=20):
        assert code == 75, line
        assert line.startswith("process 1 (") and "died: run the same command again" in line


def test_without_process_0_the_others_end(begin):
    victim, *others = together(begin("sleep", "wait", "sleep"))
    victim.kill()
    for code, line in ends(others, within=20):
        assert code == 75 and line.endswith("died: run the same command again, on all, to go on")


@pytest.mark.parametrize("me", [0, 1])
@pytest.mark.parametrize(
    "before, code, said",
    [
        ("", 75, "aborted: unless the lines above tell of a fault, another process died"),
        # The thread that ends this process waits for a lock that JAX holds while it aborts.
        ("o.client = Waits(); o.end(2, 'a mistake')", 2, "a mistake"),
    ],
)
def test_a_process_that_jax_aborts_ends(me, before, code, said):
    program = f"""
import os, threading, time
from sharding import processes as p
class Waits:
    key_value_set = lambda *_, **__: time.sleep(100)
o = p._Others()
o.me = {me}
threading.Thread(target=lambda: exec({before!r}), daemon=True).start()
time.sleep(1)
os.abort()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code and said in done.stderr


def test_a_second_signal_ends_one_at_once_and_the_others_with_it(begin):
    waits, busy = together(begin("wait", "busy"))
    for _ in range(2):
        busy.send_signal(signal.SIGTERM)
        time.sleep(1)
    (code, line), (other, last) = ends([waits, busy], within=10)
    assert code == other == 75 and line.startswith("process 1 (") and "stopped: run" in last


def test_one_that_is_silent_is_named_after_the_timeout(begin, monkeypatch):
    monkeypatch.setenv("PROCESS_TIMEOUT", "4")
    first, silent, last = together(begin("sleep", "sleep", "wait"))
    silent.send_signal(signal.SIGSTOP)
    for code, line in ends([first, last], within=30):
        assert code == 75
        assert line.startswith("process 1 (") and "silent for 4 s" in line


@pytest.mark.parametrize("place", [pytest.param(0, marks=pytest.mark.heavy), 1])
def test_one_that_fails_keeps_its_code_and_is_named(begin, place):
    for what, code, others in (("bug", 1, 75), ("mistake", 2, 2)):
        words = ["wait", "sleep"]
        words.insert(place, what)
        (*all_ends,) = ends(together(begin(*words)), within=30)
        mine = all_ends.pop(place)
        assert mine == (code, "RuntimeError: a bug" if code == 1 else "error: a mistake")
        for found, line in all_ends:
            assert found == others
            assert line.startswith(f"process {place} (") and f"a {what}" in line


def test_a_signal_to_one_that_waits_for_the_others_ends_all_at_once(begin):
    first, waits = together(begin("sleep", "wait"))
    waits.send_signal(signal.SIGTERM)
    (code, line), (other, last) = ends([first, waits], within=20)
    assert code == other == 75
    assert line.startswith("process 1 (") and "stopped: run" in line and "stopped: run" in last


def test_a_signal_ends_one_that_waits_for_the_others_to_come(begin):
    (alone,) = begin("wait", processes=2)
    time.sleep(6)
    alone.send_signal(signal.SIGTERM)
    ((code, line),) = ends([alone], within=20)
    assert code == 75 and "stopped" in line


def test_a_signal_within_a_loop_stops_all_between_two_steps(begin):
    processes = together(begin("stop", "stop", "stop"))
    time.sleep(4)
    processes[1].send_signal(signal.SIGTERM)
    counted = {next(line for line in p.stderr if " calls, " in line) for p in processes}
    for code, line in ends(processes, within=20):
        assert code == 75 and "the work is saved: run the same command again" in line
    (counted,) = counted  # all between the same two calls
    calls, questions = (int(number) for number in re.findall(r"\d+", counted))
    assert calls > 300 and questions < calls / 5


class Listening(sharding_processes._Others):
    """What it reads from a store of `messages`, without a thread, JAX or an end."""

    def __init__(self, messages):
        self.timeout, self.me, self.count, self.client = 100.0, 0, 2, self
        self.heard = {"0": (["first", 0, 0, ""], 0.0), "1": (["second", 0, 0, ""], 0.0)}
        self.messages, self.ended = messages, []

    def key_value_dir_get_bytes(self, folder):
        return self.messages

    def end(self, *said):
        self.ended.append(said)


@pytest.mark.parametrize("text", OTHER_MESSAGES, ids=range(len(OTHER_MESSAGES)))
def test_a_message_that_is_none_is_as_if_its_process_was_silent(text):
    others = Listening([("processes/1", text), ("processes/0", b'["first", 1, 0, ""]')])
    for _ in range(10):
        others._hear()
    assert others.heard["1"] == (["second", 0, 0, ""], 10 * sharding_processes.BEAT)
    assert others.heard["0"][0] == ["first", 1, 0, ""] and not others.ended
    others.messages = [("processes/1", b'["second", 1, 2, "an end"]')]
    others._hear()
    assert others.ended == [(2, "an end")] and others.heard["1"][1] == 0


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_a_key_that_is_no_process_s_is_passed_over(key):
    others = Listening([(f"processes/{key}", b'["host", 1, 0, "an end"]')])
    others._hear()
    assert not others.ended and others.heard.keys() == {"0", "1"}


def test_what_others_write_into_the_store_ends_no_run(begin):
    for code, line in ends(together(begin("wait", "writes")), within=30):
        assert code == 0, line


@pytest.mark.parametrize("number", ["²", "x", "-1", "1.0", "", " ", "1e3", "½", "9" * 5000, "0x1"])
def test_numbers_of_processes_that_are_none_are_one_line(monkeypatch, number):
    monkeypatch.setenv("COORDINATOR", "host:1234")
    for name, other in (("PROCESSES", "PROCESS_ID"), ("PROCESS_ID", "PROCESSES")):
        monkeypatch.setenv(name, number)
        monkeypatch.setenv(other, "1")
        with pytest.raises(ValueError, match=f"{name} is .*, no whole number"):
            Flags().place()
    monkeypatch.setenv("PROCESS_ID", "0")
    monkeypatch.setenv("COORDINATOR", f"host:{number}")
    with pytest.raises(ValueError, match="give HOST:PORT"):
        Flags().place()


@pytest.mark.parametrize("timeout", ["²", "x", "1", "-5", ".", "1e3", "nan", "1..5", "9" * 400])
def test_a_timeout_that_is_none_is_one_line(monkeypatch, timeout):
    monkeypatch.setenv("PROCESS_TIMEOUT", timeout)
    with pytest.raises(ValueError, match=f"PROCESS_TIMEOUT={timeout}: give seconds, from 2"):
        sharding_processes._Others()


def test_flags_and_environment_say_who_this_is(monkeypatch):
    assert Flags().place() is None
    monkeypatch.setenv("COORDINATOR", "host:1234")
    monkeypatch.setenv("PROCESSES", "4")
    monkeypatch.setenv("PROCESS_ID", "3")
    assert Flags().place() == ("host:1234", 4, 3)
    assert Flags(process_id=0).place() == ("host:1234", 4, 0)
    monkeypatch.setenv("PROCESS_ID", "x")
    with pytest.raises(ValueError, match="PROCESS_ID is 'x'"):
        Flags().place()
    monkeypatch.setenv("COORDINATOR", "auto")
    assert Flags().place() == "auto"
