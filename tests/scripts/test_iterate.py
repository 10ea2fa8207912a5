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

from stages.files.output import read_manifest
from tests import tiny, tiny_pairrm

ROOT = Path(__file__).parents[2]
RECIPE = """
model = "checkpoint:{place}/tiny"
ranker = "{place}/reward.py:reward"
iterations = 1
prompts = "{place}/prompts.jsonl"
heldout = "{place}/prompts.jsonl"
sample = {{ n = 3, max_new_tokens = 8, temperature = 1, slots = 8, dtype = "float32" }}
pairs = {{ test_count = 1 }}
[dpo]
learning_rate = 1e-3
batch_size = 2
micro_batch_size = 2
warmup_ratio = 0
dtype = "float32"
[evaluate.kl]
dtype = "float32"
[from_environment]
ITERATIONS = "iterations"
RANKER = "ranker"
PROMPTS = "prompts.file"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the code (runs/ lands in it) with a recipe for a tiny model."""
    place = tmp_path_factory.mktemp("loop")
    for name in ("model", "sharding", "stages", "scripts"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    tiny.write_checkpoint(place / "tiny")
    tiny.write_jsonl(place / "prompts.jsonl", tiny.PROMPTS)
    reward = "def reward(prompt, responses):\n    return [len(set(r)) for r in responses]"
    (place / "reward.py").write_text(reward)
    (place / "mine.toml").write_text(RECIPE.format(place=place))
    return place


def iterate(place, recipe="mine.toml", **environment):
    return subprocess.run(
        ["bash", "scripts/iterate.sh", recipe],
        cwd=place,
        env={**os.environ, "PYTHON": sys.executable, "XLA_FLAGS": tiny.xla_flags(1), **environment},
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
    assert other.returncode == 2 and "LIMIT was 0, now it is 3" in other.stderr


@pytest.mark.heavy  # two loops: a minute
def test_a_finished_run_goes_on_with_more_iterations(place):
    (place / "more.toml").write_text((place / "mine.toml").read_text())
    first = iterate(place, "more.toml", LIMIT="5")
    assert first.returncode == 0, first.stderr[-2000:]
    run = place / "runs" / "more"
    made = read_manifest(str(run / "iteration_1/prompts.jsonl"))
    assert made.counts == {"in": 5, "out": 5}  # the lineage reaches the file that LIMIT cut
    assert made.inputs["prompts"]["path"] == f"{place}/prompts.jsonl"
    kept = {path: path.read_bytes() for path in run.glob("*/*.jsonl")}
    exported = (run / "final-hf/model.safetensors").read_bytes()

    with (place / "more.toml").open("a") as recipe:
        recipe.write("# a comment\n")
    more = iterate(place, "more.toml", LIMIT="5", ITERATIONS="2")
    assert more.returncode == 0, more.stderr[-2000:]
    assert "iteration_2" in (run / "finished").read_text()
    assert all(path.read_bytes() == before for path, before in kept.items())
    assert (run / "iteration_1/hf/model.safetensors").read_bytes() == exported
    assert (run / "final-hf/model.safetensors").read_bytes() != exported
    fewer = iterate(place, "more.toml", LIMIT="5")
    assert fewer.returncode == 0 and "is finished already" in fewer.stdout


@pytest.mark.heavy  # a second loop: half a minute
def test_with_pairrm_the_table_has_win_rates_and_no_rewards(place):
    tiny_pairrm.write_pairrm(place / "pairrm")
    done = iterate(place, NAME="pairwise", RANKER=str(place / "pairrm"))
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout[done.stdout.rindex("\nmodel ") :].splitlines()
    assert "reward" not in table[1]
    assert next(line for line in table if line.startswith("iteration_1")).count("% [") == 2
    compared = json.loads((place / "runs/pairwise/iteration_1/against_start.json").read_text())
    assert compared["n"] == len(tiny.PROMPTS) and 0 <= compared["swap_consistency"] <= 1
    assert "both orders agree" in (place / "runs/pairwise/report.html").read_text()


def together(place, processes, name, **environment):
    """The loop begun by so many processes; their output is kept in place/NAME.ID."""
    coordinator = f"localhost:{tiny.free_port()}"
    return [
        subprocess.Popen(
            ["bash", "scripts/iterate.sh", "mine.toml"],
            cwd=place,
            start_new_session=True,
            stdout=open(place / f"{name}.{i}", "w"),
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHON": sys.executable,
                "NAME": name,
                "XLA_FLAGS": tiny.xla_flags(1),
                "COORDINATOR": coordinator,
                "PROCESSES": str(processes),
                "PROCESS_ID": str(i),
                **environment,
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
        assert "process 1 (" in said and said.splitlines()[-1].endswith((" to go on", " goes on"))
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
    tiny.write_jsonl(place / "bad.jsonl", [{"prompt": "Why?"}, {"text": "no prompt"}])
    running = together(place, 2, "fails", PROMPTS=str(place / "bad.jsonl"))
    assert [process.wait(timeout=300) for process in running] == [2, 2]
    assert "bad.jsonl, line 2: field 'prompt' is missing" in (place / "fails.0").read_text()
    assert "process 0 ended with exit code 2" in (place / "fails.1").read_text()


def test_what_cannot_run_is_refused_in_one_line(place):
    (place / "stages/own").mkdir()
    (place / "stages/own/bad.toml").write_text("modell = 3\n")
    unknown = iterate(place, "nothing")
    assert unknown.returncode == 2 and "no recipe nothing" in unknown.stderr
    bad = iterate(place, SEED="x")
    assert bad.returncode == 2 and "SEED=x" in bad.stderr
    some = iterate(place, COORDINATOR="localhost:1", PROCESSES="2")
    assert some.returncode == 2 and "PROCESS_ID=" in some.stderr
    elsewhere = subprocess.run(  # a recipe's path is relative to where one is
        ["bash", str(place / "scripts/iterate.sh"), "own/bad.toml"],
        cwd=place / "stages",
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert elsewhere.returncode == 2 and "bad.toml: unknown key modell" in elsewhere.stderr
    assert all(x.stderr.count("\n") == 1 for x in (unknown, bad, some, elsewhere))
    usage = iterate(place, "--help")
    assert usage.returncode == 2 and "RECIPE [MACHINE]" in usage.stdout


# ------------------------------------------------------- processes that wait for process 0


def part(
    run: Path, process_id: int, *commands: str, start_new_session=False, **environment
) -> subprocess.Popen:
    """A process of two whose loop is `commands`, with scripts/together.sh."""
    script = ["set -euo pipefail", "source scripts/together.sh", "show_life", *commands]
    return subprocess.Popen(
        ["bash", "-c", "\n".join(script)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
        env={
            **{"PATH": os.environ["PATH"], "run": str(run), "COORDINATOR": "localhost:1"},
            **{"PROCESSES": "2", "PROCESS_ID": str(process_id), "RUNS": str(run), **environment},
        },
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def test_the_others_wait_for_process_0_and_end_as_it_ends(tmp_path):
    waits = part(tmp_path, 1, "once $run/done false", "cat $run/made >$run/read")
    works = part(tmp_path, 0, "once $run/done eval 'sleep 2; echo [$COORDINATOR] >$run/made'")
    assert end(works) == end(waits) == (0, "")
    assert (tmp_path / "read").read_text() == "[]\n"  # process 0 was alone meanwhile

    waits = part(tmp_path, 1, "once $run/more false")
    fails = part(tmp_path, 0, "once $run/more eval 'sleep 1; exit 2'")
    assert end(fails) == (2, "")
    assert end(waits) == (2, "process 0 ended with exit code 2: see its output\n")

    waits = part(tmp_path, 1, "once $run/more false")  # an earlier failure is none of this one's
    works = part(tmp_path, 0, "once $run/more sleep 2")
    assert end(works) == end(waits) == (0, "")
    assert not list(tmp_path.glob(".process_1*"))


@pytest.mark.parametrize(
    "command", ["mv {}/none x", "echo | tee {}/none/x", "mkdir {}/none/x", "echo >{}/none/x"]
)
def test_a_file_that_the_loop_cannot_write_is_one_line(tmp_path, command):
    work = f"work() {{ {command.format(tmp_path)}; }}"
    code, said = end(part(tmp_path, 0, work, "once $run/done work"))
    assert code == 2 and "error: " in said.splitlines()[-1] and "none" in said.splitlines()[-2]


@pytest.mark.parametrize("code", [2, 75, 1])
@pytest.mark.parametrize("earlier", [True, False])
def test_where_process_0_fails_before_another_waits_that_one_ends_too(tmp_path, code, earlier):
    if earlier:
        end(part(tmp_path, 0, "once $run/done exit 1"))
        time.sleep(0.1)
    waits = part(tmp_path, 1, "touch $run/here", "sleep 2", "once $run/done false")
    while not (tmp_path / "here").exists():
        time.sleep(0.05)
    assert end(part(tmp_path, 0, f"once $run/done exit {code}"))[0] == code
    begun = time.monotonic()
    assert end(waits)[0] == (2 if code == 2 else 75) and time.monotonic() - begun < 10


@pytest.mark.parametrize("mark", ["", "host.1.1\n", "of an earlier version"])
def test_what_an_earlier_command_has_done_is_not_what_this_one_waits_for(tmp_path, mark):
    end(part(tmp_path, 0, "once $run/done true"))
    before = (tmp_path / "done").read_text()
    (tmp_path / "done").write_text(mark or before)
    waits = part(tmp_path, 1, "once $run/done false", "test -e $run/made")
    time.sleep(0.5)
    works = part(tmp_path, 0, "once $run/done eval 'sleep 1.5; touch $run/made'")
    assert end(works) == end(waits) == (0, "")


@pytest.mark.parametrize(
    "code,gives", [(130, 75), (137, 75), (143, 75), (139, 139), (1, 1), (2, 2)]
)
@pytest.mark.parametrize("coordinator", ["", "localhost:1"])
def test_a_loop_whose_stage_was_killed_can_go_on(tmp_path, code, gives, coordinator):
    loop = part(tmp_path, 0, f"once $run/done exit {code}", COORDINATOR=coordinator)
    said = "stopped: the same command goes on\n" if gives == 75 else ""
    assert end(loop) == (gives, said)


@pytest.mark.parametrize(
    "coordinator,command,gives",
    [("", "", 134), ("localhost:1", "", 75), ("localhost:1", "once $run/done", 134)],
)
def test_an_abort_by_jax_is_another_process_that_died(tmp_path, coordinator, command, gives):
    loop = part(tmp_path, 0, f"{command} sh -c 'exit 134'", COORDINATOR=coordinator)
    code, said = end(loop)
    assert code == gives and ("another process died" in said) == (gives == 75)


def test_where_process_0_is_killed_the_others_give_up(tmp_path):
    waits = part(tmp_path, 1, "once $run/done false", PROCESS_TIMEOUT="2")
    killed = part(tmp_path, 0, "once $run/done sleep 60")
    while not (tmp_path / ".process_0.alive").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    time.sleep(2)
    killed.kill()
    code, said = end(waits)
    assert code == 75 and "process 0 has shown no sign of life for 3 seconds" in said


def test_where_process_0_is_killed_before_another_waits_that_one_gives_up(tmp_path):
    waits = part(
        tmp_path, 1, "touch $run/here", "sleep 4", "once $run/done false", PROCESS_TIMEOUT="2"
    )
    while not (tmp_path / "here").exists():
        time.sleep(0.05)
    killed = part(tmp_path, 0, "once $run/done sleep 60", start_new_session=True)
    time.sleep(2)
    os.killpg(killed.pid, signal.SIGKILL)
    begun = time.monotonic()
    code, said = end(waits)
    assert code == 75 and "no sign of life" in said and time.monotonic() - begun < 15


def test_a_signal_to_the_whole_group_of_process_0_ends_it_with_75(tmp_path):
    waits = part(tmp_path, 1, "once $run/done false")
    stage = "python3 -c 'import signal; signal.signal(15, lambda *_: exit(75)); signal.pause()'"
    stopped = part(tmp_path, 0, f"once $run/done {stage}", start_new_session=True)
    while not (tmp_path / ".process_0.alive").exists():
        assert stopped.poll() is None
        time.sleep(0.05)
    time.sleep(2)
    os.killpg(stopped.pid, signal.SIGTERM)
    assert end(stopped) == (75, "stopped: the same command goes on\n")
    assert end(waits) == (
        75,
        "process 0 ended with exit code 75: see its output\nstopped: the same command goes on\n",
    )
