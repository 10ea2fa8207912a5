"""scripts/bench: both sides of each comparison, with small models."""

import re
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


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.heavy), "bfloat16"])
def test_sampling_counts_its_tokens_and_accounts_for_a_step(folders, dtype):
    args = sample.Sample(n=2, max_new_tokens=8, slots=4)
    texts = [row["prompt"] for row in tiny.PROMPTS[:3]]
    questions = [("work", 1), ("account",)]
    (seconds, tokens, _, parts), account = asked(
        sample.Ours, folders[0], args, texts, questions=questions, dtype=dtype
    )
    assert 6 <= tokens <= 3 * 2 * 8 and 0 < sum(parts.values()) <= seconds
    assert set(parts) == {"decode steps", "prefill"}
    assert account["slots"] == 4 and 0 < account["seconds"] < seconds
    weights = sum(x.size for x in tiny_weights(folders[0]))
    size = {"float32": 4, "bfloat16": 2}[dtype]
    assert account["parts"]["products with the layers"][2] == size * weights


def tiny_weights(folder: str) -> list:
    import jax

    return jax.tree.leaves(checkpoint.load(folder)[1]["layers"])


def check_compared(said: str, *others: str) -> None:
    """Each side at each precision has its line, and ours stands beside every other."""
    line = r"^(.+), (float32|bfloat16) +([\d.e+-]+) \w+/s, .*peak [\d.]+ GiB"
    rates = {(name, d): float(rate) for name, d, rate in re.findall(line, said, re.M)}
    assert rates.keys() == {(name, d) for name in ("ours", *others) for d in machine.BOTH}
    row = r"^(.+), (float32|bfloat16)( \(its best\))? +([\d.]+) +([\d.]+)$"
    rows = re.findall(row, said, re.M)
    assert {row[:2] for row in rows} == rates.keys() - {("ours", d) for d in machine.BOTH}
    assert sum(bool(row[2]) for row in rows) == len(others)
    assert all(f"{lib} {d} " in said for lib in ("JAX", "PyTorch") for d in machine.BOTH)


@pytest.mark.heavy
def test_sampling_is_compared(folders, tmp_path, capsys):
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", tiny.PROMPTS)
    how = {"count": 3, "n": 2, "max_new_tokens": 8, "slots": 4}
    how |= {"batches": (6, 2), "first_tokens": 2}
    sample.bench(sample.Sample(checkpoint=folders[0], prompts=prompts, **how))
    said = capsys.readouterr().out
    check_compared(said, "transformers")
    assert all(f"{kind} {batch} " in said for kind in ("eager", "sdpa") for batch in (6, 2))
    assert "attention over the cache" in said


@pytest.mark.heavy
def test_ranking_is_compared(tmp_path, capsys):
    folder = str(tiny_pairrm.write_pairrm(tmp_path / "pairrm"))
    answers = [{"text": text} for text in ("Water.", "I do not know.", "It falls.")]
    rows = [{"prompt": text, "responses": answers} for text in ("What is rain?", "And snow?")]
    samples = tiny.write_jsonl(tmp_path / "samples.jsonl", rows)
    rank.bench(rank.Rank(ranker=folder, samples=samples, prompts=2))
    said = capsys.readouterr().out
    check_compared(said, "llm-blender")
    apart = {name: float(x) for name, x in re.findall(r"^(.+?)  .* within (.+?) of", said, re.M)}
    assert apart["ours, float32"] < 1e-4 < apart["ours, bfloat16"] < 0.5
    assert apart["llm-blender, float32"] == 0 and 1e-4 < apart["llm-blender, bfloat16"] < 0.5


@pytest.mark.heavy
def test_training_is_compared(folders, data, capsys):
    dpo.bench(dpo.Dpo(checkpoint=folders[0], steps=2, pairs=2, max_length=64))
    said = capsys.readouterr().out
    check_compared(said, "TRL", "TRL, precomputed")
    apart = re.findall(r"^(TRL.*), (float32|bfloat16) .* from ours by (\S+?),", said, re.M)
    assert len(apart) == 4
    assert all(float(x) < (1e-3 if dtype == "float32" else 1) for _, dtype, x in apart)
    assert said.count("% of its GEMM rate") == 2


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
