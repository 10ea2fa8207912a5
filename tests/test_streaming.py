"""Sampling holds the answers in the making, not the prompts."""

import json
import os
import subprocess
import sys

import pytest

from tests import tiny


def peak_of_sampling(folder, count: int) -> int:
    """Bytes that the process which answers `count` prompts held at most, by Linux's account (not
    ru_maxrss: that begins with what the parent held)."""
    with open(folder / f"{count}.jsonl", "w") as file:
        for i in range(count):
            prompt = f"Question {i} of {count}: " + "what is the model? " * (i % 5)
            file.write(json.dumps({"prompt": prompt}) + "\n")
    argv = ["--checkpoint", f"{folder}/model", "--prompts", f"{folder}/{count}.jsonl",
            "--out", f"{folder}/{count}.samples.jsonl", "--n", "1", "--max-new-tokens", "2",
            "--slots", "64"]  # fmt: skip
    told = (
        "import sys; from stages import records, sample;"
        "code = records.run(sample.main, sample.Args, sys.argv[1:]);"
        "print(*(l for l in open('/proc/self/status') if l.startswith('VmHWM'))); sys.exit(code)"
    )
    one_device = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    run = subprocess.run([sys.executable, "-c", told, *argv], env=one_device,
                         stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert run.returncode == 0
    line = next(line for line in run.stdout.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@pytest.mark.heavy
def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path):
    tiny.write_checkpoint(tmp_path / "model")
    # With fewer than 10,000, what jax and the allocator keep for themselves has not all come yet.
    few, many = peak_of_sampling(tmp_path, 10_000), peak_of_sampling(tmp_path, 100_000)
    print(f"peak {few / 2**20:.0f} MiB with 10,000 prompts, {many / 2**20:.0f} with 100,000")
    # Their ids and where their rows lie in the file are kept: well below a kilobyte a prompt.
    assert many - few < 90_000 * 1000
    rows = sum(1 for _ in open(tmp_path / "100000.samples.jsonl"))
    assert rows == 100_000
