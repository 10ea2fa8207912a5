"""scripts/iterate.sh, the loop itself, on a tiny model: one iteration, then again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

from tests import tiny, tiny_pairrm

ROOT = Path(__file__).parents[2]
ONE_DEVICE = "--xla_force_host_platform_device_count=1"
RECIPE = """
start_model()     {{ mkdir -p "$(dirname "$1")"; cp -r {model} "$1"; }}
train_prompts()   {{ cp {prompts} "$2"; }}
heldout_prompts() {{ cp {prompts} "$1"; }}
ITERATIONS=1
RANKER={reward}:reward
SAMPLE="--n 3 --max-new-tokens 8 --temperature 1 --slots 8"
PAIRS="--test-count 1"
DPO="--learning-rate 1e-3 --batch-size 2 --micro-batch-size 2 --warmup-ratio 0"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the code (runs/ lands in it) with a recipe for a tiny model."""
    place = tmp_path_factory.mktemp("loop")
    for name in ("model", "sharding", "stages", "scripts"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    tiny.write_checkpoint(place / "tiny")
    prompts = tiny.write_jsonl(place / "prompts.jsonl", tiny.PROMPTS)
    reward = place / "reward.py"
    reward.write_text("def reward(prompt, responses):\n    return [len(set(r)) for r in responses]")
    recipe = RECIPE.format(model=place / "tiny", prompts=prompts, reward=reward)
    (place / "mine.sh").write_text(recipe)
    return place


def iterate(place, recipe="mine.sh", **environment):
    return subprocess.run(
        ["bash", "scripts/iterate.sh", recipe],
        cwd=place,
        env={**os.environ, "PYTHON": sys.executable, "XLA_FLAGS": ONE_DEVICE, **environment},
        capture_output=True,
        text=True,
    )


def test_the_loop_runs_shows_its_table_exports_and_knows_when_it_is_done(place):
    done = iterate(place)
    assert done.returncode == 0, done.stderr[-2000:]
    run = place / "runs" / "mine"
    assert "best so far" in done.stdout
    table = done.stdout[done.stdout.rindex("\nmodel ") :].splitlines()
    won = next(line for line in table if line.startswith("iteration_1"))
    assert won.count("% [") == 2  # against the start, and the same against the previous model
    assert "</html>" in (run / "report.html").read_text()
    kl = json.loads((run / "iteration_1/kl_to_start.json").read_text())
    assert kl["prompts"] == len(tiny.PROMPTS) and f"{kl['kl_per_token']:.3f}" in won
    for name in ("prompts", "samples", "ranked", "pairs", "pairs.test"):
        assert (run / "iteration_1" / f"{name}.jsonl").exists()
    transformers.AutoModelForCausalLM.from_pretrained(run / "final-hf")
    card = (run / "final-hf" / "README.md").read_text()
    assert f"| the base model | reward.py:reward | {len(tiny.PROMPTS)} |" in card
    assert f"| this model ‖ the base model | heldout.samples.jsonl | {kl['prompts']} |" in card
    again = iterate(place)
    assert again.returncode == 0 and "is finished already" in again.stdout
    assert "sample" not in again.stdout.splitlines()[0]
    other = iterate(place, LIMIT="3")
    assert other.returncode == 2 and "other settings" in other.stderr


@pytest.mark.heavy  # a second loop: half a minute
def test_with_pairrm_the_table_has_win_rates_and_no_rewards(place):
    tiny_pairrm.write_pairrm(place / "pairrm")
    recipe = (place / "mine.sh").read_text()
    (place / "pairwise.sh").write_text(recipe + f"RANKER={place / 'pairrm'}\n")
    done = iterate(place, "pairwise.sh")
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout[done.stdout.rindex("\nmodel ") :].splitlines()
    assert "reward" not in table[1]
    assert next(line for line in table if line.startswith("iteration_1")).count("% [") == 2
    compared = json.loads((place / "runs/pairwise/iteration_1/against_start.json").read_text())
    assert compared["n"] == len(tiny.PROMPTS) and 0 <= compared["swap_consistency"] <= 1
    assert "both orders agree" in (place / "runs/pairwise/report.html").read_text()


def together(place, processes, name, recipe="mine.sh"):
    """The loop begun by so many processes; their output is kept in place/NAME.ID."""
    coordinator = f"localhost:{tiny.free_port()}"
    return [
        subprocess.Popen(
            ["bash", "scripts/iterate.sh", recipe],
            cwd=place,
            start_new_session=True,
            stdout=open(place / f"{name}.{i}", "w"),
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHON": sys.executable,
                "NAME": name,
                "XLA_FLAGS": ONE_DEVICE,
                "COORDINATOR": coordinator,
                "PROCESSES": str(processes),
                "PROCESS_ID": str(i),
            },
        )
        for i in range(processes)
    ]


@pytest.mark.heavy
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_run_the_loop_and_go_on_where_one_was_killed(place, processes):
    if not (place / "runs/alone/finished").exists():
        assert iterate(place, NAME="alone").returncode == 0
    name = f"together-{processes}"
    run, running = place / "runs" / name, together(place, processes, name)
    while not (run / "iteration_1/checkpoint.log/metrics.jsonl").exists():
        assert running[0].poll() is None, (place / f"{name}.0").read_text()[-2000:]
        time.sleep(0.02)
    os.killpg(running[1].pid, signal.SIGKILL)
    for i in {*range(processes)} - {1}:
        assert running[i].wait(timeout=120) == 75
        said = (place / f"{name}.{i}").read_text()
        assert "process 1 (" in said and "goes on" in said.splitlines()[-1]
    running = together(place, processes, name)
    said = [
        (process.wait(), (place / f"{name}.{i}").read_text()[-2000:])
        for i, process in enumerate(running)
    ]
    assert [code for code, _ in said] == [0] * processes, said
    assert "best so far" in said[0][1] and "best so far" not in said[1][1]
    transformers.AutoModelForCausalLM.from_pretrained(run / "final-hf")
    alone = place / "runs/alone"
    for file in ("heldout.jsonl", "iteration_1/prompts.jsonl"):
        assert (run / file).read_bytes() == (alone / file).read_bytes()
    for row, other in zip(*(tiny.read_jsonl(r / "iteration_1/ranked.jsonl") for r in (run, alone))):
        assert row["scores"] == other["scores"]
        for ours, theirs in zip(row["responses"], other["responses"], strict=True):
            assert ours["token_ids"] == theirs["token_ids"]


@pytest.mark.heavy
def test_where_process_0_fails_alone_the_others_end_as_it_does(place):
    (place / "bad.sh").write_text((place / "mine.sh").read_text() + "\nPAIRS=--strategy=none\n")
    running = together(place, 2, "fails", "bad.sh")
    assert [process.wait(timeout=300) for process in running] == [2, 2]
    assert "process 0 (" in (place / "fails.1").read_text()


def test_an_unknown_recipe_or_a_bad_number_is_refused(place):
    unknown = iterate(place, "nothing")
    assert unknown.returncode == 2 and "no recipe nothing" in unknown.stderr
    bad = iterate(place, SEED="x")
    assert bad.returncode == 2 and "SEED=x" in bad.stderr
    some = iterate(place, COORDINATOR="localhost:1", PROCESSES="2")
    assert some.returncode == 2 and "PROCESS_ID=" in some.stderr


def test_the_published_recipe_asks_for_the_published_settings(place):
    """The Zephyr recipes' numbers reach the stages' command lines."""
    script = (
        'python() { :; }; source scripts/recipes/snorkel-mistral-7b.sh; echo "$SAMPLE $DPO $PAIRS"'
    )
    for year, words in (
        ("2023", ("--beta 0.1", "linear", "rmsprop", "--epochs 3", "--batch-size 64")),
        ("2024", ("--beta 0.01", "cosine", "adamw", "--epochs 1", "--batch-size 128")),
    ):
        shown = subprocess.run(
            ["bash", "-c", script],
            cwd=place,
            capture_output=True,
            text=True,
            env={**os.environ, "ZEPHYR": year},
        )
        for word in (*words, "--learning-rate 5e-7", "--max-length 1024", "--n 5"):
            assert word in shown.stdout
        assert "--test-count" not in shown.stdout  # with LIMIT it would leave nothing to train on
