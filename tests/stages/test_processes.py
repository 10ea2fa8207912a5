"""Several real processes on this machine as one run, over CPU collectives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from model import checkpoint, checkpoint_writing
from stages import dpo, rank, sample
from stages.files.output import read_manifest
from stages.files.run import run_main
from tests import tiny, tiny_pairrm

# No top-p: of two thousand draws from near-uniform distributions, rounding decides at its border
# whether a token is kept now and then. With seed 0 a draw falls within 1e-7 of another token's.
DRAWS = [
    "--n",
    "3",
    "--max-new-tokens",
    "12",
    "--temperature",
    "1",
    "--top-p",
    "1",
    "--slots",
    "4",
    "--seed",
    "1",
]


def start(stage, argv, process_id, port, processes=2):
    argv = [
        *argv,
        "--coordinator",
        f"localhost:{port}",
        "--processes",
        str(processes),
        "--process-id",
        str(process_id),
    ]
    # A device a process: on CPU several may lock, see sharding/processes.py.
    environment = os.environ | {"XLA_FLAGS": tiny.xla_flags(1)}
    return subprocess.Popen(
        [sys.executable, "-m", f"stages.{stage}", *argv],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def sample_argv(folder, out, *more) -> list[str]:
    return [
        "--checkpoint",
        f"{folder}/model",
        "--prompts",
        f"{folder}/prompts.jsonl",
        "--out",
        f"{folder}/{out}",
        "--dtype",
        "float32",
        *DRAWS,
        *more,
    ]


def dpo_argv(folder, out, *more) -> list[str]:
    return [
        "--checkpoint",
        f"{folder}/model",
        "--pairs",
        f"{folder}/pairs.jsonl",
        "--out",
        f"{folder}/{out}",
        "--learning-rate",
        "1e-3",
        "--batch-size",
        "8",
        "--micro-batch-size",
        "4",
        "--epochs",
        "2",
        "--warmup-ratio",
        "0",
        "--max-length",
        "128",
        "--max-prompt-length",
        "96",
        "--dtype",
        "float32",
        *more,
    ]


def ended(running) -> list[str]:
    """What the processes said; all of them must end well."""
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), said
    return said


def together(stage, argv, processes=2):
    port = tiny.free_port()
    return [start(stage, argv, i, port, processes) for i in range(processes)]


heavy = pytest.mark.heavy
# Of processes and meshes those that are quick to run; all of them with --heavy.
MESHES = [
    pytest.param(2, ("1", "-1", "1"), id="2-fsdp"),
    pytest.param(2, ("1", "1", "2"), id="2-tensor"),
    pytest.param(4, ("1", "-1", "1"), id="4-fsdp", marks=heavy),
    pytest.param(4, ("1", "2", "2"), id="4-tensor", marks=heavy),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    tiny.write_checkpoint(folder / "model")
    tiny.write_checkpoint(folder / "other", seed=1)
    rows = [{"prompt": f"{row['prompt']} {i}"} for i in range(4) for row in tiny.PROMPTS]
    tiny.write_jsonl(folder / "prompts.jsonl", [*rows, {"prompt": "x" * 400}])
    assert run_main(sample.main, sample.Args, sample_argv(folder, "alone.jsonl")) == 0
    pairs = []
    for i in range(20):
        row = {"prompt_id": str(i), "prompt": f"What is the model of {i}?"}
        for side, text in (("chosen", "It answers " * (1 + i % 4)), ("rejected", "x" * (1 + i))):
            row[side] = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": text},
            ]
        pairs.append(row)
    tiny.write_jsonl(folder / "pairs.jsonl", pairs)
    assert run_main(dpo.main, dpo.Args, dpo_argv(folder, "alone")) == 0
    return folder


def same_answers(one, other):
    for a, b in zip(tiny.read_jsonl(one), tiny.read_jsonl(other), strict=True):
        for x, y in zip(a.pop("responses"), b.pop("responses"), strict=True):
            assert x.pop("logprob") == pytest.approx(y.pop("logprob"), abs=1e-4)
            assert x == y
        assert a == b


@heavy  # where one is killed, two processes draw what one draws
@pytest.mark.parametrize("processes,mesh", MESHES)
def test_processes_on_one_mesh_draw_what_one_draws(folder, processes, mesh):
    out = f"{processes}-mesh-{'-'.join(mesh)}.jsonl"
    ended(together("sample", sample_argv(folder, out, "--mesh", *mesh), processes))
    same_answers(folder / out, folder / "alone.jsonl")
    aside = [tiny.read_jsonl(folder / f"{name}.set_aside.jsonl") for name in (out, "alone.jsonl")]
    assert aside[0] == aside[1] and len(aside[0]) == 1


def wait_for(text: str, file, running):
    """Until `text` stands in a file that is being written."""
    while not (file.exists() and text in file.read_text()):
        assert running[0].poll() is None, running[0].stderr.read()
        time.sleep(0.02)


def test_a_stop_of_one_process_stops_all_and_they_go_on(folder):
    argv = sample_argv(folder, "stopped.jsonl")
    running = together("sample", argv)
    partial = folder / "stopped.jsonl.partial"
    wait_for('"responses"', partial, running)
    running[1].send_signal(signal.SIGTERM)  # not the one that writes
    assert [process.wait() for process in running] == [75, 75]
    assert partial.read_text().count('"responses"') < 4 * len(tiny.PROMPTS)
    ended(together("sample", argv))
    same_answers(folder / "stopped.jsonl", folder / "alone.jsonl")


def ended_without(running, victim: int):
    """The others end since one was killed, and say so; JAX aborts them where it was process 0."""
    for process in running[:victim] + running[victim + 1 :]:
        said = process.communicate(timeout=120)[1]
        last = said.splitlines()[-1]
        assert process.returncode == 75 and "died: run the same command again" in last, said
        assert f"process {victim} (" in last or victim == 0


@pytest.mark.parametrize(
    "processes,victim",
    [pytest.param(n, i, marks=heavy) for n, i in ((2, 0), (2, 1), (4, 0), (4, 2))],
)
def test_where_one_is_killed_the_others_end_and_all_go_on(folder, processes, victim):
    out = f"killed-{processes}-{victim}.jsonl"
    argv, partial = sample_argv(folder, out), folder / f"{out}.partial"
    running = together("sample", argv, processes)
    wait_for('"responses"', partial, running)
    running[victim].kill()
    ended_without(running, victim)
    assert not (folder / out).exists()
    ended(together("sample", argv, processes))
    same_answers(folder / out, folder / "alone.jsonl")


def losses(folder, out) -> np.ndarray:
    rows = tiny.read_jsonl(folder / f"{out}.log/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    return np.array([row["loss"] for row in rows])


def flat(folder) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(checkpoint.load(str(folder))[1])])


@heavy
@pytest.mark.parametrize(
    "processes,mesh", [pytest.param(2, ("1", "-1", "1"), id="2-fsdp", marks=heavy), *MESHES[1:]]
)
def test_processes_on_one_mesh_train_what_one_trains(folder, processes, mesh):
    out = f"{processes}-mesh-{'-'.join(mesh)}"
    shutil.rmtree(folder / "pairs.jsonl.reference")  # its log-probs are computed together too
    ended(together("dpo", dpo_argv(folder, out, "--mesh", *mesh), processes))
    np.testing.assert_allclose(losses(folder, out), losses(folder, "alone"), rtol=0, atol=1e-5)
    start, alone, found = (flat(folder / name) for name in ("model", "alone", out))
    assert np.linalg.norm(found - alone) < 1e-3 * np.linalg.norm(alone - start)
    assert checkpoint.identity(str(folder / out)) == checkpoint_writing.fingerprint(
        checkpoint.load(str(folder / out))[1]
    )
    assert not (folder / f"{out}.work").exists()


@pytest.fixture(scope="module")
def unbroken(folder):
    """The identity of what two processes train that nothing stops."""
    ended(together("dpo", dpo_argv(folder, "unbroken")))
    return checkpoint.identity(str(folder / "unbroken"))


def begun(folder, out, step: int):
    """(command, processes) of a training that has ended this step."""
    argv = dpo_argv(folder, out, "--save-every", "2")
    running = together("dpo", argv)
    wait_for(f'"step": {step},', folder / f"{out}.log/metrics.jsonl", running)
    return argv, running


@pytest.mark.heavy
def test_a_training_whose_process_was_stopped_goes_on_to_the_same_end(folder, unbroken):
    argv, running = begun(folder, "halted", step=1)
    running[1].send_signal(signal.SIGTERM)
    assert [process.wait() for process in running] == [75, 75]
    assert list((folder / "halted.work").glob("state-?"))
    ended(together("dpo", argv))
    assert checkpoint.identity(str(folder / "halted")) == unbroken


@pytest.mark.heavy
@pytest.mark.parametrize("victim", [0, 1])
def test_a_training_whose_process_was_killed_names_it_and_goes_on(folder, unbroken, victim):
    out = f"killed-{victim}"
    argv, running = begun(folder, out, step=4)  # its state of step 2 is whole
    running[victim].kill()
    ended_without(running, victim)
    assert not (folder / out).exists()
    ended(together("dpo", argv))
    assert checkpoint.identity(str(folder / out)) == unbroken


def rank_argv(folder, ranker, out) -> list[str]:
    return [
        "--ranker",
        f"{folder}/{ranker}",
        "--samples",
        f"{folder}/ranks.jsonl",
        "--out",
        f"{folder}/{out}",
    ]


@pytest.fixture(scope="module")
def ranked(folder):
    """What one process makes of samples, by a reward function and by a PairRM."""
    tiny_pairrm.write_pairrm(folder / "pairrm")
    (folder / "reward.py").write_text(
        "def reward(prompt, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    rows = tiny.read_jsonl(folder / "alone.jsonl")[:9]
    rows[3] |= {"responses": []}  # is set aside
    tiny.write_jsonl(folder / "ranks.jsonl", rows)
    for ranker in RANKERS:
        argv = rank_argv(folder, ranker, f"{ranker[:6]}.alone.jsonl")
        assert run_main(rank.main, rank.Args, argv) == 0
    return folder


RANKERS = ["reward.py:reward", "pairrm"]


@pytest.mark.parametrize(
    "processes,ranker", [(2, RANKERS[0]), *(pytest.param(4, r, marks=heavy) for r in RANKERS)]
)
def test_processes_on_one_mesh_rank_what_one_ranks(ranked, processes, ranker):
    name = f"{ranker[:6]}.{processes}.jsonl"
    ended(together("rank", rank_argv(ranked, ranker, name), processes))
    alone = ranked / f"{ranker[:6]}.alone.jsonl"
    if ranker != "pairrm":
        assert (ranked / name).read_bytes() == alone.read_bytes()
    for a, b in zip(tiny.read_jsonl(ranked / name), tiny.read_jsonl(alone), strict=True):
        np.testing.assert_allclose(a["scores"], b["scores"], rtol=0, atol=1e-5)
        assert {**a, "scores": 0, "comparisons": 0} == {**b, "scores": 0, "comparisons": 0}
    ours, theirs = (read_manifest(str(path)) for path in (ranked / name, alone))
    assert ours.counts == theirs.counts and ours.counts["set aside: no responses"] == 1
    assert ours.results.keys() == theirs.results.keys()
    assert not list(ranked.glob(f"{name}.partial*"))


def evaluated(folder, command, out, *more, processes=1):
    """The JSON that `stages.evaluate` makes by so many processes, and its manifest."""
    argv = [command, "--out", f"{folder}/{out}", *more]
    if processes == 1:
        assert subprocess.run([sys.executable, "-m", "stages.evaluate", *argv]).returncode == 0
    else:
        ended(together("evaluate", argv, processes))
    assert not list(folder.glob(f"{out}*partial*"))
    return json.loads((folder / out).read_text()), read_manifest(f"{folder}/{out}")


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=heavy)])
def test_processes_on_one_mesh_judge_what_one_judges(ranked, processes):
    rows = tiny.read_jsonl(ranked / "alone.jsonl")[:9]
    tiny.write_jsonl(ranked / "ours.jsonl", rows)
    for row in rows:
        row["responses"] = row["responses"][1:]
    tiny.write_jsonl(ranked / "theirs.jsonl", rows)
    given = [
        "--outputs",
        f"{ranked}/ours.jsonl",
        "--baseline",
        f"{ranked}/theirs.jsonl",
        "--ranker",
        f"{ranked}/pairrm",
    ]
    alone, one = evaluated(ranked, "compare", "judged.1.json", *given)
    found, several = evaluated(
        ranked, "compare", f"judged.{processes}.json", *given, processes=processes
    )
    margins = [[x.pop("margin") for x in content["per_instruction"]] for content in (found, alone)]
    np.testing.assert_allclose(*margins, rtol=0, atol=1e-5)
    assert len(margins[0]) == 9 and np.abs(margins[0]).max() > 1e-3
    correlation = "score_length_correlation"
    assert found.pop(correlation) == pytest.approx(alone.pop(correlation), abs=1e-5)
    assert found == alone and several.counts == one.counts


@pytest.mark.parametrize("processes", [pytest.param(n, marks=heavy) for n in (2, 4)])
def test_the_divergence_is_computed_by_all(folder, processes):
    given = ["--checkpoint", f"{folder}/other", "--samples", f"{folder}/alone.jsonl"]
    given += ["--dtype", "float32"]
    alone, one = evaluated(folder, "kl", "kl.1.json", *given)
    found, several = evaluated(folder, "kl", f"kl.{processes}.json", *given, processes=processes)
    assert found["n"] == alone["n"] > 50 and several.counts == one.counts
    assert found["kl_per_token"] == pytest.approx(alone["kl_per_token"], abs=1e-5)
    assert found["standard_error"] == pytest.approx(alone["standard_error"], abs=1e-5)


@pytest.mark.heavy
def test_the_answers_to_a_benchmark_are_sampled_by_all(folder):
    def argv(out):
        return [
            "outputs",
            "--checkpoint",
            f"{folder}/model",
            "--benchmark",
            f"{folder}/benchmark.jsonl",
            "--out",
            f"{folder}/{out}",
            "--best-of",
            "3",
            "--ranker",
            f"{folder}/longest.py:reward",
            "--max-new-tokens",
            "12",
            "--temperature",
            "1",
            "--top-p",
            "1",
            "--slots",
            "4",
            "--dtype",
            "float32",
        ]

    tiny.write_jsonl(folder / "benchmark.jsonl", tiny.read_jsonl(folder / "prompts.jsonl")[:10])
    (folder / "longest.py").write_text("def reward(prompt, answers):\n    return map(len, answers)")
    ended(together("evaluate", argv("together.json")))
    alone = [sys.executable, "-m", "stages.evaluate", *argv("alone.json")]
    assert subprocess.run(alone).returncode == 0
    assert (folder / "together.json").read_bytes() == (folder / "alone.json").read_bytes()


@pytest.mark.parametrize("stage", ["sample", "dpo"])
def test_processes_that_were_given_different_things_refuse(folder, stage):
    flag, argv = ("--top-k", sample_argv) if stage == "sample" else ("--epochs", dpo_argv)
    port = tiny.free_port()
    running = [start(stage, argv(folder, "differ", flag, str(i + 1)), i, port) for i in range(2)]
    for process in running:
        assert process.wait() == 2
        assert "different" in process.stderr.read()


@pytest.mark.parametrize(
    "flags,word",
    [
        (["--processes", "2"], "--coordinator"),
        (["--coordinator", "localhost:1"], "--process-id"),
        (["--coordinator", "localhost", "--processes", "2", "--process-id", "0"], "HOST:PORT"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process-id", "2"], "0 to 1"),
        (["--coordinator", "auto"], "auto"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(folder, flags, word, capsys):
    argv = sample_argv(folder, "refused.jsonl", *flags)
    assert run_main(sample.main, sample.Args, argv) == 2
    assert word in capsys.readouterr().err
