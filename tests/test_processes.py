"""Several real processes on this machine as one run, over CPU collectives."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from stages import records, sample
from tests import tiny

# No top-p: of two thousand draws from near-uniform distributions, rounding decides at its border
# whether a token is kept now and then. With seed 0 a draw falls within 1e-7 of another token's.
DRAWS = ["--n", "3", "--max-new-tokens", "12", "--temperature", "1", "--top-p", "1", "--slots", "4",
         "--seed", "1"]  # fmt: skip


def start(folder, out, process_id, *more, processes=2, port):
    argv = ["--checkpoint", f"{folder}/model", "--prompts", f"{folder}/prompts.jsonl",
            "--out", f"{folder}/{out}", *DRAWS, "--coordinator", f"localhost:{port}",
            "--processes", str(processes), "--process-id", str(process_id), *more]  # fmt: skip
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.Popen([sys.executable, "-m", "stages.sample", *argv], env=environment,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def together(folder, out, *more):
    port = free_port()
    return [start(folder, out, i, *more, port=port) for i in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    tiny.write_checkpoint(folder / "model")
    rows = [{"prompt": f"{row['prompt']} {i}"} for i in range(8) for row in tiny.PROMPTS]
    tiny.write_jsonl(folder / "prompts.jsonl", [*rows, {"prompt": "x" * 400}])
    argv = ["--checkpoint", f"{folder}/model", "--prompts", f"{folder}/prompts.jsonl",
            "--out", f"{folder}/alone.jsonl", *DRAWS]  # fmt: skip
    assert records.run(sample.main, sample.Args, argv) == 0
    return folder


def same_answers(one, other):
    for a, b in zip(tiny.read_jsonl(one), tiny.read_jsonl(other), strict=True):
        for x, y in zip(a.pop("responses"), b.pop("responses"), strict=True):
            assert x.pop("logprob") == pytest.approx(y.pop("logprob"), abs=1e-4)
            assert x == y
        assert a == b


@pytest.mark.parametrize("mesh", [("1", "-1", "1"), ("1", "2", "2")])
def test_processes_on_one_mesh_draw_what_one_draws(folder, mesh):
    out = f"mesh-{'-'.join(mesh)}.jsonl"
    for process in together(folder, out, "--mesh", *mesh):
        assert process.wait() == 0, process.stderr.read()
    same_answers(folder / out, folder / "alone.jsonl")
    aside = [tiny.read_jsonl(folder / f"{name}.set_aside.jsonl") for name in (out, "alone.jsonl")]
    assert aside[0] == aside[1] and len(aside[0]) == 1


def test_a_stop_of_one_process_stops_all_and_they_go_on(folder):
    running = together(folder, "stopped.jsonl")
    partial = folder / "stopped.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size):
        assert running[0].poll() is None, running[0].stderr.read()
        time.sleep(0.02)
    running[1].send_signal(signal.SIGTERM)  # not the one that writes
    assert [process.wait() for process in running] == [75, 75]
    assert 0 < len(partial.read_bytes().splitlines()) < 80
    for process in together(folder, "stopped.jsonl"):
        assert process.wait() == 0, process.stderr.read()
    same_answers(folder / "stopped.jsonl", folder / "alone.jsonl")


def test_processes_that_were_given_different_things_refuse(folder):
    port = free_port()
    running = [start(folder, "differ.jsonl", i, "--top-k", str(i), port=port) for i in range(2)]
    for process in running:
        assert process.wait() == 2
        assert "different prompts, checkpoints or arguments" in process.stderr.read()


@pytest.mark.parametrize(
    "flags,word",
    [
        (["--processes", "2"], "--coordinator"),
        (["--coordinator", "localhost:1"], "--process-id"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process-id", "2"], "0 to 1"),
        (["--coordinator", "localhost:1", "--share", "0", "2"], "one of them"),
        (["--coordinator", "auto"], "auto"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(folder, flags, word, capsys):
    argv = ["--checkpoint", f"{folder}/model", "--prompts", f"{folder}/prompts.jsonl",
            "--out", f"{folder}/refused.jsonl", *flags]  # fmt: skip
    assert records.run(sample.main, sample.Args, argv) == 2
    assert word in capsys.readouterr().err
