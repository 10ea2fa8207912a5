"""Fifty training steps give the same numbers however they are computed."""

import os
import random
import subprocess
import sys

import jax
import numpy as np
import pytest

from model import checkpoint
from stages import dpo
from stages.files.run import run_main
from stages.files.work import Work
from tests import tiny

STEPS = 50
RNG = random.Random(0)
WORDS = "the model answers a question and stops so that nobody has to wait for rain or snow".split()


def text(most: int) -> str:
    return " ".join(RNG.choices(WORDS, k=RNG.randint(1, most)))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equivalence")
    tiny.write_checkpoint(folder / "model", num_key_value_heads=4)
    rows = []
    for i in range(80):
        prompt = text(12)
        row = {"prompt_id": str(i), "prompt": prompt}
        for side in ("chosen", "rejected"):
            row[side] = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": text(20)},
            ]
        rows.append(row)
    tiny.write_jsonl(folder / "pairs.jsonl", rows)
    return folder


def argv(folder, out, *more) -> list[str]:
    base = {
        "--batch-size": "8",
        "--micro-batch-size": "8",
        "--epochs": "5",
        "--remat": "none",
        "--learning-rate": "1e-4",
        "--mesh": "1 1 -1",
        "--dtype": "float32",
    }
    base |= {"--checkpoint": f"{folder}/model", "--pairs": f"{folder}/pairs.jsonl", "--out": out}
    flags = base | dict(zip(more[::2], more[1::2]))
    return [word for flag, value in flags.items() for word in (flag, *str(value).split())]


def run(folder, out, *more, devices: int = 4):
    """(losses of all steps, final parameters in one vector)."""
    if devices == 4:
        assert run_main(dpo.main, dpo.Args, argv(folder, out, *more)) == 0
    else:
        environment = os.environ | {"XLA_FLAGS": tiny.xla_flags(1)}
        command = [sys.executable, "-m", "stages.dpo", *argv(folder, out, *more)]
        subprocess.run(command, env=environment, check=True)
    return result(out)


def result(out):
    rows = [r for r in tiny.read_jsonl(f"{out}.log/metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    return np.array([r["loss"] for r in rows]), flat(out)


def flat(folder) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(checkpoint.load(str(folder))[1])])


@pytest.fixture(scope="module")
def base(start):
    return run(start, start / "base")


VARIANTS = {
    "micro-batches 4×2": ("--micro-batch-size", "4"),
    "micro-batches 1×8": ("--micro-batch-size", "1"),
    "remat full": ("--remat", "full"),
    "unpacked": ("--rows", "pairs"),
    "prompts not shared": ("--rows", "responses"),
    "4 devices, fsdp": ("--mesh", "1 4 1"),
    "4 devices, fsdp and tensor": ("--mesh", "1 2 2"),
    "4 devices, data and fsdp": ("--mesh", "2 2 1"),
    "1 device": (),
    "reference computed anew": (),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", VARIANTS)
def test_fifty_steps_are_the_same(start, base, tmp_path, name):
    if name == "reference computed anew":
        (cached,) = (start / "pairs.jsonl.reference").glob("*.npy")
        cached.unlink()
    found = run(start, tmp_path / "out", *VARIANTS[name], devices=1 if name == "1 device" else 4)
    update = base[1] - flat(start / "model")
    apart = np.linalg.norm(found[1] - base[1]) / np.linalg.norm(update)
    furthest = np.abs(found[0] - base[0]).max()
    print(f"{name}: losses within {furthest:.1e}, update within {apart:.1e}")
    assert furthest < 1e-5
    assert apart < 1e-3
    assert base[0][-1] < base[0][0] - 0.01  # it learned


@pytest.mark.heavy
def test_a_run_killed_at_random_steps_is_bit_identical(start, base, tmp_path, monkeypatch):
    log, kill_at = Work.log, sorted(random.Random(1).sample(range(3, STEPS), 3))

    def killing(self, step, values):
        log(self, step, values)
        if kill_at and step == kill_at[0]:
            kill_at.pop(0)
            raise MemoryError("stands for a kill")

    monkeypatch.setattr(Work, "log", killing)
    out = tmp_path / "out"
    while kill_at:
        with pytest.raises(MemoryError):
            run_main(dpo.main, dpo.Args, argv(start, out, "--save-every", "4"))
    assert run_main(dpo.main, dpo.Args, argv(start, out, "--save-every", "4")) == 0
    losses, params = result(out)
    assert (losses == base[0]).all() and (params == base[1]).all()
