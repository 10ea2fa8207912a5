"""Processes that watch each other: real ones, without JAX."""

import signal
import subprocess
import sys
import time

import pytest

from sharding.watch import Flags
from tests.tiny import free_port

# Joins, says so, and does what its last argument says.
CODE = """
import sys, time
from sharding import watch
what = sys.argv[4]
if what == "few":
    watch.ARRIVAL = 5
watch.start(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
print("there", flush=True)
if what == "bug":
    try:
        raise RuntimeError("a bug")
    finally:
        watch.end(1)
elif what == "wait":
    time.sleep(60)
elif what == "leave":
    watch.end(0)
    time.sleep(60)
watch.end(int(what))
sys.exit(int(what))
"""


@pytest.fixture
def begin(monkeypatch):
    monkeypatch.setenv("PROCESS_TIMEOUT", "40")
    coordinator, running = f"localhost:{free_port()}", []

    def begin(*what, processes=None):
        for me, word in enumerate(what):
            if word is not None:
                argv = [coordinator, str(processes or len(what)), str(me), word]
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-c", CODE, *argv],
                        text=True,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                    )
                )
        return running

    yield begin
    for process in running:
        process.kill()


def ends(processes, within: float):
    """(exit code, stderr) of each."""
    start = time.monotonic()
    said = [process.communicate(timeout=30)[1] for process in processes]
    assert time.monotonic() - start < within
    return [(process.returncode, text) for process, text in zip(processes, said)]


def together(processes):
    for process in processes:
        assert process.stdout.readline() == "there\n"


@pytest.mark.parametrize("victim", [0, 2])
def test_one_that_is_killed_is_named_by_all_others_at_once(begin, victim):
    processes = begin("wait", "wait", "wait")
    together(processes)
    processes[victim].kill()
    others = [p for i, p in enumerate(processes) if i != victim]
    for code, said in ends(others, within=20):
        assert code == 75
        assert said.startswith(f"\nprocess {victim} (") and "died" in said
        assert len(said.splitlines()) == 2


def test_one_that_is_silent_is_named_after_the_timeout(begin, monkeypatch):
    monkeypatch.setenv("PROCESS_TIMEOUT", "4")
    processes = begin("wait", "wait", "wait")
    together(processes)
    processes[1].send_signal(signal.SIGSTOP)
    for code, said in ends([processes[0], processes[2]], within=30):
        assert code == 75
        assert said.startswith("\nprocess 1 (") and "silent for 4 s" in said


def test_one_that_fails_keeps_its_code_and_is_named(begin):
    (bug, said), *others = ends(begin("bug", "wait", "wait"), within=20)
    assert bug == 1 and "RuntimeError: a bug" in said
    for code, said in others:
        assert code == 75 and said.startswith("\nprocess 0 (") and "exit code 1" in said
    (waits, said), mistake = ends(begin("wait", "2")[-2:], within=20)
    assert waits == 2 and said.startswith("\nprocess 1 (")
    assert mistake == (2, "")


def test_one_that_is_stopped_stops_the_others_and_all_that_are_have_nothing_to_add(begin):
    (waits, said), stopped = ends(begin("wait", "75"), within=20)
    assert waits == 75 and said.startswith("\nprocess 1 (") and "was stopped" in said
    assert stopped == (75, "")
    assert ends(begin("75", "75", "75")[-3:], within=20) == [(75, "")] * 3


def test_one_that_is_done_may_go_but_still_learns_of_the_others(begin):
    (first, leaves, _) = processes = begin("leave", "leave", "wait")
    together(processes)
    time.sleep(1)
    leaves.kill()
    time.sleep(2)
    assert first.poll() is None and processes[2].poll() is None
    processes[2].kill()
    assert ends([first], within=20)[0][0] == 75


def test_one_that_does_not_come_is_named(begin):
    (code, said), _ = ends(begin("few", "few", processes=4), within=30)
    assert code == 1 and "process 2, 3 of 4 did not come within 5 s" in said


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
