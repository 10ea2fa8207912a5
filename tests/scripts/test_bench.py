"""scripts/bench: both sides of each comparison, with small models."""

import subprocess
import sys
import time

import numpy as np
import pytest

from model import checkpoint
from scripts import convert
from scripts.bench import bf16, dpo, machine, rank, sample
from scripts.bench.machine import Side
from tests import tiny, tiny_pairrm

GROUPS = [
    [("Why?", ["So.", "No."])],
    [("What is rain?", ["Water.", "I do not know.", "It falls."])],
]
PAIRS = [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [9, 8, 7]}] * 4


def asked(worker, *args, questions, dtype="float32"):
    side = Side("a side", dtype, worker, *args)
    try:
        return [side.ask(*question) for question in questions]
    finally:
        side.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of ours, and the same in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("bench")
    tiny.write_checkpoint(folder / "model")
    convert.main(convert.ToHf(f"{folder}/model", f"{folder}/hf", dtype="float32"))
    return f"{folder}/model", f"{folder}/hf"


def test_pairrm_ranks_and_counts_what_it_did(tmp_path):
    folder = str(tiny_pairrm.write_pairrm(tmp_path / "pairrm"))
    questions = [("warm",), ("work", 1), ("way_and_memory",)]
    (made, tokens, padded), (seconds, count, flops, scores), (_, memory) = asked(
        rank.Ours, folder, GROUPS, questions=questions
    )
    assert seconds > 0 and made == count == 6 and scores.shape == (1, 3) and np.ptp(scores) > 0
    assert padded >= tokens > 6 * 10 and flops > 0 and memory > 2**27
    ((_, _, _, half),) = asked(
        rank.Ours, folder, GROUPS, questions=questions[1:2], dtype="bfloat16"
    )
    assert 0 < np.abs(half - scores).max() < 0.1 * np.ptp(scores)


@pytest.mark.heavy
def test_llm_blender_ranks_in_float32_and_under_autocast(tmp_path):
    folder = str(tiny_pairrm.write_pairrm(tmp_path / "pairrm"))
    scores = {}
    for kind, dtype in ((rank.Ours, "float32"), *((rank.Theirs, d) for d in machine.BOTH)):
        ((seconds, count, _, scores[kind, dtype]),) = asked(
            kind, folder, GROUPS, questions=[("work", 1)], dtype=dtype
        )
        assert seconds > 0 and count == 6
    ours, exact, half = scores.values()
    assert np.abs(ours - exact).max() < 1e-4 and 1e-4 < np.abs(half - exact).max() < 0.5


@pytest.mark.parametrize("dtype", machine.BOTH)
def test_sampling_counts_its_tokens_and_accounts_for_a_step(folders, dtype):
    args = sample.Sample(n=2, max_new_tokens=8, slots=4)
    texts = [row["prompt"] for row in tiny.PROMPTS[:3]]
    questions = [("work", 1), ("account",)]
    (seconds, tokens, _, parts), account = asked(
        sample.Ours, folders[0], args, texts, questions=questions, dtype=dtype
    )
    assert 6 <= tokens <= 3 * 2 * 8 and 0 < sum(took for took, _ in parts.values()) <= seconds
    assert set(parts) == {"decode steps", "prefill"}
    assert account["slots"] == 4 and 0 < account["seconds"] < seconds
    weights = sum(x.size for x in tiny_weights(folders[0]))
    size = {"float32": 4, "bfloat16": 2}[dtype]
    assert account["parts"]["products with the layers"][2] == size * weights


def tiny_weights(folder: str) -> list:
    import jax

    return jax.tree.leaves(checkpoint.load(folder)[1]["layers"])


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", machine.BOTH)
def test_transformers_chooses_how_to_generate_and_counts_its_tokens(folders, dtype):
    args = sample.Sample(n=2, max_new_tokens=8, batches=(6, 2), first_tokens=2)
    texts = [row["prompt"] for row in tiny.PROMPTS[:3]]
    questions = [("warm",), ("work", 1), ("way_and_memory",), ("gemm",)]
    _, (seconds, tokens, _), (way, _), gemm = asked(
        sample.Theirs, folders[1], args, texts, questions=questions, dtype=dtype
    )
    assert seconds > 0 and 6 <= tokens <= 3 * 2 * 8 and gemm > 1e9
    assert all(name in way for name in ("eager 6", "eager 2", "sdpa 6", "sdpa 2"))


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", machine.BOTH)
def test_training_steps_are_timed_on_both_sides(folders, dtype):
    args = dpo.Dpo(pairs=2, steps=2)
    (ours, padding), (seconds, pairs, flops), gemm = asked(
        dpo.Ours,
        folders[0],
        PAIRS,
        args,
        questions=[("warm",), ("work", 2), ("gemm",)],
        dtype=dtype,
    )
    assert all(logp < 0 for logp in ours) and 0 <= padding < 1 and gemm > 1e9
    assert seconds > 0 and pairs == 2 and flops > 0
    for precompute in (False, True):
        steps, logps = asked(
            dpo.Theirs,
            folders[1],
            PAIRS,
            args,
            precompute,
            questions=[("work", 0), ("logps",)],
            dtype=dtype,
        )
        assert steps[0] > 0
        assert logps == pytest.approx(ours, abs=1e-4 if dtype == "float32" else 0.3)


@pytest.mark.heavy
def test_what_bfloat16_changes(folders, data, tmp_path, capsys):
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", tiny.PROMPTS)
    args = bf16.Bf16(
        checkpoint=folders[0],
        prompts=prompts,
        greedy=3,
        sampled=5,
        max_new_tokens=8,
        slots=(8, 4),
        steps=2,
        max_length=48,
    )
    bf16.bench(args)
    said = capsys.readouterr().out
    assert "greedy answers, float32 and bfloat16: " in said and "of 3 equal" in said
    assert said.count("of 25 equal") == 2 and "2 DPO steps" in said
    steps = {line.split()[0]: line.split()[1:] for line in said.splitlines()[-5:]}
    assert [*steps] == bf16.METRICS
    for ours, theirs, exact in steps.values():
        assert 0 < float(ours) < 1 and 0 < float(theirs) < 1 and float(exact) < 1e-3


class Fake(machine.Worker):
    def __init__(self, dtype, seconds):
        super().__init__(dtype)
        self.seconds, self.order = seconds, []

    def gemm(self):
        return 2e9

    def work(self, turn):
        self.order.append(turn)
        return self.seconds / turn if turn else 1000.0, 10, 1e9

    def done(self):
        return self.order


def test_sides_take_turns_and_are_compared_at_their_best_and_at_the_same_precision(capsys):
    seconds = {("ours", "float32"): 4, ("a", "float32"): 8, ("ours", "bfloat16"): 2}
    seconds |= {("a", "bfloat16"): 3}
    sides = [Side(name, dtype, Fake, s) for (name, dtype), s in seconds.items()]
    try:
        machine.warm_up(sides)
        machine.in_turns("turn", [1], sides)
        machine.in_turns("turn", [2], sides[2:])
        assert [side.ask("done") for side in sides] == [[0, 0, 1]] * 2 + [[0, 0, 1, 2]] * 2
        machine.report(sides[2], "things/s")
        assert machine.compare(sides) is sides[2]
    finally:
        for side in sides:
            side.close()
    said = capsys.readouterr().out
    assert "turn 2: ours, bfloat16 1.0 s; a, bfloat16 1.5 s" in said
    assert "6.667 things/s" in said and "33% of its GEMM rate" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["a,", "float32", "4.00", "2.00"] in rows  # over the first turn, which all took
    assert ["a,", "bfloat16", "(its", "best)", "1.50", "1.50"] in rows


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
