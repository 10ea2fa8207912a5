"""scripts/bench: its own side of each comparison, with small models."""

import subprocess
import sys
import time

import numpy as np
import pytest

from scripts.bench import dpo, rank, sample
from scripts.bench.machine import Side, in_turns
from tests import tiny, tiny_pairrm


def asked(worker, *args, questions):
    side = Side(worker, *args)
    try:
        return [side.ask(*question) for question in questions]
    finally:
        side.close()


def test_pairrm_ranks_and_counts_what_it_did(tmp_path):
    folder = tiny_pairrm.write_pairrm(tmp_path / "pairrm")
    group = [("What is rain?", ["Water.", "I do not know.", "It falls."])]
    _, (seconds, (matrix,)), (tokens, padded, flops) = asked(
        rank.Ours, str(folder), questions=[("warm", [group]), ("rank", group), ("work", [group])]
    )
    assert seconds > 0 and matrix.shape == (3, 3)
    assert np.count_nonzero(matrix) == 6 and not matrix.diagonal().any()
    assert padded >= tokens > 6 * 10 and flops > 0


def test_sampling_counts_its_tokens_and_accounts_for_a_step(tmp_path):
    tiny.write_checkpoint(tmp_path / "model")
    args = sample.Sample(n=2, max_new_tokens=8, slots=4)
    texts = [row["prompt"] for row in tiny.PROMPTS[:3]]
    (seconds, tokens, parts), account = asked(
        sample.Ours, str(tmp_path / "model"), args, texts, questions=[("sample",), ("account",)]
    )
    assert 6 <= tokens <= 3 * 2 * 8 and 0 < sum(took for took, _ in parts.values()) <= seconds
    assert set(parts) == {"decode steps", "prefill"}
    assert account["slots"] == 4 and 0 < account["seconds"] < seconds


@pytest.mark.heavy
def test_training_steps_are_timed(tmp_path):
    tiny.write_checkpoint(tmp_path / "model")
    pair = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [9, 8, 7]}
    facts, (step,), gemm = asked(
        dpo.Ours,
        str(tmp_path / "model"),
        [pair] * 4,
        dpo.Dpo(pairs=2),
        questions=[("warm",), ("step", 1), ("gemm",)],
    )
    assert all(logp < 0 for logp in facts["logps"]) and (facts["flops"] > 0).all()
    assert step > 0 and gemm > 1e9


def test_sides_take_turns(capsys):
    order = []

    def work(name):
        return lambda turn: order.append((name, turn)) or (turn, name)

    sides = {name: work(name) for name in "ab"}
    results, rates = in_turns("turn", [1, 2], sides, gemm=lambda: 2e9)
    assert rates == [2e9, 2e9] and order == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert results == {"a": [(1, "a"), (2, "a")], "b": [(1, "b"), (2, "b")]}
    assert "turn 2 of 2: a 2.0 s, b 2.0 s (GEMM 2 GFLOP/s)" in capsys.readouterr().out


def test_help_answers_within_two_seconds():
    begun = time.process_time()
    code = (
        "import runpy, sys\n"
        "sys.argv = ['x', '--help']\n"
        "try: runpy.run_module('scripts.bench', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'jax', 'flax', 'transformers', 'torch', 'scipy', 'datasets', 'orbax'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "") and "gemm" in run.stdout
    assert time.process_time() - begun < 2
