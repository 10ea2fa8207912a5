"""The host's side of 100,000 prompts: stages hold ids and what is in the making, not their files; a
training holds its pairs, as compact arrays."""

import json
import os
import subprocess
import sys

import pytest

from tests import tiny

FEW, MANY = 10_000, 100_000
TOKENS = 100  # of a sampled answer
WORDS = "the model is an answer to what a question asks and no more than that".split()


def peak(code: str, *argv: str) -> int:
    """Bytes that a process which runs `code` held at most, by Linux's account (not ru_maxrss: that
    begins with what the parent held)."""
    told = "print(*(l for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    one_device = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{told}", *argv],
        env=one_device,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.returncode == 0
    line = next(line for line in run.stdout.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def stage(name: str) -> str:
    return (
        f"from stages import {name}\nfrom stages.files.run import run_main\n"
        f"assert run_main({name}.main, {name}.Args, sys.argv[1:]) == 0"
    )


def growth(what: str, few: int, many: int) -> float:
    print(f"{what}: peak {few / 2**20:.0f} MiB with {FEW} rows, {many / 2**20:.0f} with {MANY}")
    return (many - few) / (MANY - FEW)


def rows_in(path) -> int:
    return sum(1 for _ in open(path))


def write_prompts(path, count: int):
    with open(path, "w") as file:
        for i in range(count):
            prompt = f"Question {i} of {count}: " + "what is the model? " * (i % 5)
            file.write(json.dumps({"prompt": prompt}) + "\n")


def write_samples(path, count: int, answers: int = 5):
    """As large as real ones: 400 characters and 100 tokens an answer, 4 kB a row."""
    with open(path, "w") as file:
        for i in range(count):
            responses = []
            for k in range(answers):
                words = (WORDS[(i * answers + k + j * (1 + k)) % len(WORDS)] for j in range(100))
                ids = [(i + k + j) % 300 + 3 for j in range(TOKENS)]
                responses.append(
                    {
                        "text": " ".join(words),
                        "token_ids": ids,
                        "logprob": -9.5,
                        "finish_reason": "stop",
                    }
                )
            row = {
                "prompt_id": f"{i:064x}",
                "prompt": f"Question {i}?",
                "prompt_token_ids": [1, *range(3, 23)],
                "responses": responses,
            }
            file.write(json.dumps(row) + "\n")


@pytest.mark.heavy
def test_sampling_holds_the_answers_in_the_making_and_not_the_prompts(tmp_path):
    tiny.write_checkpoint(tmp_path / "model")
    peaks = []
    # With fewer than 10,000, what jax and the allocator keep for themselves has not all come yet.
    for count in (FEW, MANY):
        write_prompts(tmp_path / f"{count}.jsonl", count)
        peaks.append(
            peak(
                stage("sample"),
                "--checkpoint",
                f"{tmp_path}/model",
                "--prompts",
                f"{tmp_path}/{count}.jsonl",
                "--out",
                f"{tmp_path}/{count}.samples.jsonl",
                "--n",
                "1",
                "--max-new-tokens",
                "2",
                "--slots",
                "64",
            )
        )
    # Their ids and where their rows lie in the file are kept: well below a kilobyte a prompt.
    assert growth("sample", *peaks) < 1000
    assert rows_in(tmp_path / f"{MANY}.samples.jsonl") == MANY


@pytest.mark.heavy
def test_ranking_pairing_and_reading_pairs_hold_ids_and_token_arrays(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(prompt, responses):\n    return [len(set(r)) for r in responses]")
    tiny.write_checkpoint(tmp_path / "model")
    read = f"""
from collections import Counter
from model.tokenizer import ChatTokenizer
from stages.files.examples import read_pairs
tokenizer = ChatTokenizer.from_folder({str(tmp_path / "model")!r}, (2,))
aside = []
examples, file = read_pairs(sys.argv[1], tokenizer, {tiny.VOCABULARY}, 1024, 512, aside)
assert len(examples) == file.counts["in"] == int(sys.argv[2]) and not aside
"""
    peaks = {"rank": [], "pairs": [], "dpo, pairs with tokens": []}
    for count in (FEW, MANY):
        samples, ranked, pairs = (
            f"{tmp_path}/{count}.{name}.jsonl" for name in ("samples", "ranked", "pairs")
        )
        write_samples(samples, count)
        peaks["rank"].append(
            peak(
                stage("rank"), "--ranker", f"{reward}:reward", "--samples", samples, "--out", ranked
            )
        )
        peaks["pairs"].append(peak(stage("pairs"), "--ranked", ranked, "--out", pairs))
        assert rows_in(pairs) == count
        peaks["dpo, pairs with tokens"].append(peak(read, pairs, str(count)))
        for done in (samples, ranked, pairs):
            os.unlink(done)
    a_row = {name: growth(name, *found) for name, found in peaks.items()}
    assert a_row["rank"] < 1000  # ids, and where rows lie
    assert a_row["pairs"] < 2000  # …and lengths and scores, of which a correlation is made
    # A pair: 4 bytes a token, and its id, objects and place in the list.
    assert a_row["dpo, pairs with tokens"] < 4 * (21 + 2 * (TOKENS + 1)) + 1000
