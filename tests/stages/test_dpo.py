"""stages.dpo through its command line: what it trains, resuming, and the caller's mistakes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from model import checkpoint, gates, logprobs
from model.batches import Batcher
from model.tokenizer import ChatTokenizer
from scripts import cards
from sharding.errors import UserError
from stages.files import examples as reading
from stages.files.examples import read_pairs, template_head
from stages.files.lock import lock, lock_file
from stages.files.output import manifest_path
from stages.files.work import Work
from tests import tiny
from tests.stages.chain import dpo_argv, metrics, refused, run_dpo, run_sample


def test_dpo_starts_at_ln_2_learns_and_writes_a_complete_checkpoint(base, tmp_path, capsys):
    out = tmp_path / "out"
    code = run_dpo(base, out, "--test-pairs", str(base / "pairs.test.jsonl"), "--epochs", "8")
    assert code == 0
    rows = metrics(out)
    assert rows[0]["step"] == 0 and rows[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    steps = [r for r in rows if "loss" in r]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["loss"] < 0.5 and steps[-1]["rewards/accuracies"] == 1
    names = {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "grad_norm",
        "learning_rate",
    }
    assert names <= steps[0].keys()
    for r in steps:
        assert r["rewards/margins"] == pytest.approx(
            r["rewards/chosen"] - r["rewards/rejected"], abs=1e-5
        )
    manifest = checkpoint.read_manifest(str(out))
    assert manifest["identity"] != checkpoint.identity(str(base / "model"))
    assert manifest["origin"]["identities"]["reference"] == checkpoint.identity(str(base / "model"))
    assert manifest["parent"] == checkpoint.read_manifest(str(base / "model"))
    assert [entry["stage"] for entry in manifest["data"]] == ["pairs", "rank", "sample"]
    card = cards.model_card(manifest, "float32", None, [])
    assert "| ranker | reward.py:reward |" in card
    assert "| answers to each | 3, temperature 1.0, top-p 0.9, up to 12 tokens |" in card
    assert f"| test pairs ordered right | {rows[-1]['eval_rewards/accuracies']:.1%} |" in card
    assert not (tmp_path / "out.work").exists()
    assert list((tmp_path / "out.log" / "tensorboard").iterdir())
    assert "agree within" in capsys.readouterr().out
    # What a training leaves that was killed at its very end is removed.
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work/manifest.json").touch()
    open(lock_file(str(out)), "w").close()
    assert run_dpo(base, out, "--test-pairs", str(base / "pairs.test.jsonl"), "--epochs", "8") == 0
    assert "finished already" in capsys.readouterr().out
    assert not (tmp_path / "out.work").exists() and not os.path.exists(lock_file(str(out)))
    # The trained checkpoint is a model like any other.
    assert run_sample(base, model=out, out="again.jsonl") == 0


@pytest.mark.heavy
@pytest.mark.parametrize("micro", ["2", "3"])
def test_micro_batches_only_cut_the_sum(base, tmp_path, micro):
    assert run_dpo(base, tmp_path / "a", "--batch-size", "3") == 0
    assert run_dpo(base, tmp_path / "b", "--batch-size", "3", "--micro-batch-size", micro) == 0
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.heavy
def test_devices_only_share_the_work(base, tmp_path):
    assert run_dpo(base, tmp_path / "a") == 0
    assert run_dpo(base, tmp_path / "b", "--mesh", "1", "4", "1") == 0
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.parametrize(
    "how",
    ["signal", "kill after a save", pytest.param("kill before any save", marks=pytest.mark.heavy)],
)
def test_a_training_that_was_stopped_ends_bit_identical(base, tmp_path, how, monkeypatch, capsys):
    test = ["--test-pairs", str(base / "pairs.test.jsonl")]
    assert run_dpo(base, tmp_path / "straight", *test) == 0
    log = Work.log

    def stopping(self, step, values):
        log(self, step, values)
        if step == 3:
            if how == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise MemoryError("stands for a kill")

    monkeypatch.setattr(Work, "log", stopping)
    more = [*test, "--save-every", "2" if how == "kill after a save" else "0"]
    if how == "signal":
        assert run_dpo(base, tmp_path / "out", *more) == 75
        assert "run the same command again" in capsys.readouterr().err
    else:
        with pytest.raises(MemoryError):
            run_dpo(base, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run_dpo(base, tmp_path / "out", *more) == 0
    if how != "kill before any save":
        assert "going on after step" in capsys.readouterr().out
    assert checkpoint.identity(str(tmp_path / "out")) == checkpoint.identity(
        str(tmp_path / "straight")
    )
    assert metrics(tmp_path / "out") == metrics(tmp_path / "straight")
    assert [r["step"] for r in metrics(tmp_path / "out") if "eval_loss" in r] == [0, 6]
    results = checkpoint.read_manifest(str(tmp_path / "out"))["origin"]["results"]
    assert results["sampler_disagreement"] < 1e-3 and results["steps"] == 6


def test_an_explicit_reference_is_used_and_recorded(base, tmp_path, capsys):
    more = ["--reference", str(base / "other"), "--allow-other-model"]
    assert run_dpo(base, tmp_path / "out", *more) == 0
    assert metrics(tmp_path / "out")[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    origin = checkpoint.read_manifest(str(tmp_path / "out"))["origin"]
    assert origin["identities"]["reference"] == checkpoint.identity(str(base / "other"))
    assert str(base / "other") in capsys.readouterr().out


def test_long_prompts_keep_the_templates_ends_and_cuts_are_counted(base, tmp_path, capsys):
    rows = [
        {
            "prompt_id": "long",
            "prompt": "word " * 60,
            "chosen": talk("yes " * 40, "word " * 60),
            "rejected": talk("no", "word " * 60),
        },
        {"prompt_id": "short", "prompt": "hi", "chosen": talk("a"), "rejected": talk("b")},
    ]
    tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    tokenizer = ChatTokenizer.from_folder(str(base / "model"), (2,))
    examples, file = read_pairs(str(tmp_path / "p.jsonl"), tokenizer, tiny.VOCABULARY, 80, 40, [])
    assert file.counts == {"in": 2, "prompts cut": 1, "responses cut": 1}
    whole = tokenizer.prompt_ids([{"role": "user", "content": rows[0]["prompt"]}])
    empty = tokenizer.prompt_ids([{"role": "user", "content": "a"}])
    head = template_head(tokenizer)
    cut = examples[0].prompt.tolist()
    assert len(cut) == 40 and cut[:head] == whole[:head] and cut[head:] == whole[-(40 - head) :]
    assert cut[-5:] == empty[-5:]
    assert len(examples[0].prompt) + len(examples[0].chosen) == 80
    assert examples[0].rejected[-1] == 2  # EOS: a text without token ids counts as ended
    assert examples[0].chosen[-1] != 2  # …but not where its end was cut off


def talk(text, asked="hi"):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]


def test_eos_is_trained_only_where_the_answer_ended_by_itself(base, tmp_path):
    rows = [
        {
            "prompt_id": "x",
            "prompt": "hi",
            "chosen": talk("a"),
            "rejected": talk("b"),
            "chosen_token_ids": [70],
            "chosen_finish_reason": "length",
            "rejected_token_ids": [71],
            "rejected_finish_reason": "stop",
        }
    ]
    tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    tokenizer = ChatTokenizer.from_folder(str(base / "model"), (2,))
    (example,), _ = read_pairs(str(tmp_path / "p.jsonl"), tokenizer, tiny.VOCABULARY, 1024, 512, [])
    assert example.chosen.tolist() == [70]
    assert example.rejected.tolist() == [71, 2]


def test_pairs_that_cannot_be_trained_on_are_set_aside_with_their_reason(base, tmp_path, capsys):
    rows = tiny.read_jsonl(base / "pairs.jsonl")
    rows[0] |= {
        "chosen_token_ids": [5],
        "rejected_token_ids": [5],
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "stop",
    }
    rows[1] |= {"chosen_token_ids": [], "chosen_finish_reason": "length"}
    for row in rows:
        row.pop("chosen_logprob")
    tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    assert run_dpo(base, tmp_path / "out", pairs=tmp_path / "p.jsonl") == 0
    assert "no manifest" in capsys.readouterr().out
    aside = tiny.read_jsonl(f"{tmp_path / 'out'}.log/set_aside.jsonl")
    assert [r["reason"] for r in aside] == ["chosen equals rejected", "empty prompt or response"]
    counts = checkpoint.read_manifest(str(tmp_path / "out"))["origin"]["counts"]
    assert counts["in"] == len(rows) and counts["set aside: chosen equals rejected"] == 1


INDICES = {"chosen_index": 0, "rejected_index": 1, "all_rm_scores": [1, 0]}


@pytest.mark.parametrize(
    "fields",
    [
        *({"comparisons": matrix} for matrix in ({"a": 1}, [{"0": 1}, {}], [[0]], "xx")),
        {"comparisons": [[0, "1"], ["2", 0]]},
        {"comparisons": [[0, 1], [[2], 0]]},
        {"comparisons": [[0, 1e308], [-1e308, 0]]},
        {"comparisons": [[0, 1], [1, 0]], "chosen_index": -1},
        {"comparisons": [[0, 1], [1, 0]], "rejected_index": 2},
        {"comparisons": [[0, 1], [1, 0]], "rejected_index": "1"},
        {"comparisons": [[0, 1], [1, 0]], "rejected_index": 1.0},
    ],
)
def test_a_ranking_that_does_not_fit_its_pair_is_told_in_one_line(fields):
    with pytest.raises(UserError, match=r"^here: .* do not fit together"):
        reading._win_probability(INDICES | fields, "here")


@pytest.mark.parametrize(
    ("fields", "probability"),
    [
        ({"win_probability": 0.7}, 0.7),
        ({"win_probability": 1, "comparisons": [[0, None], [None, 0]]}, 1.0),
        ({"comparisons": [[0, 3.0], [1.0, 0]]}, 1 / (1 + math.exp(-1))),
        ({"comparisons": [[0, 3.0], [1.0, 0]], "all_rm_scores": [2, 0]}, 1 / (1 + math.exp(-1))),
        ({"comparisons": [[0, 5000.0], [-5000.0, 0]]}, 1.0),
        # What is no probability: a reward's scale, wins, answers that never met.
        ({}, None),
        ({"all_rm_scores": [1.0, -1.0], "comparisons": [[0, None], [None, 0]]}, None),
        ({"comparisons": [[0, 3.0], [None, 0]]}, None),
        ({"comparisons": None}, None),
        ({"comparisons": [[0, 1], [1, 0]], "chosen_index": None}, None),
    ],
)
def test_a_probability_comes_from_logits_of_these_two_answers_alone(fields, probability):
    assert reading._win_probability(INDICES | fields, "here") == pytest.approx(probability)


def test_sppo_refuses_pairs_whose_answers_never_met(base, tmp_path, capsys):
    rows = tiny.read_jsonl(base / "pairs.jsonl")  # of a reward function
    tiny.write_jsonl(tmp_path / "scores.jsonl", rows)
    bubble = [
        row | {"comparisons": [[0.0 if i == j else None for j in range(3)] for i in range(3)]}
        for row in rows
    ]
    tiny.write_jsonl(tmp_path / "bubble.jsonl", bubble)
    for name in ("scores", "bubble"):
        code = run_dpo(base, tmp_path / "out", "--loss", "sppo", pairs=tmp_path / f"{name}.jsonl")
        words = f"--loss sppo: {len(rows)} pairs have no win_probability", "--comparisons full"
        refused(capsys, code, *words)
        assert not (tmp_path / "out").exists()


def test_pairs_of_another_model_are_refused_unless_the_flag_says_otherwise(base, tmp_path, capsys):
    out = tmp_path / "out"
    refused(capsys, run_dpo(base, out, model="other"), "another model", "--allow-other-model")
    assert not out.exists()


@pytest.mark.parametrize(
    "flags,word",
    [
        (["--beta", "0"], "--beta"),
        (["--epochs", "0"], "--epochs"),
        (["--max-prompt-length", "128"], "--max-prompt-length"),
        (["--reference", "nowhere"], "nowhere"),
        (["--max-prompt-length", "3"], "opening"),
    ],
)
def test_training_settings_that_make_no_sense_are_refused(base, tmp_path, capsys, flags, word):
    refused(capsys, run_dpo(base, tmp_path / "out", *flags), word)


def test_the_first_loss_is_checked_by_the_pairs_that_its_step_has(base, tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(gates, "check_ln_2", lambda *given: checked.append(given))
    assert run_dpo(base, tmp_path / "out", "--batch-size", "64") == 0
    (given,) = checked
    assert given[1:] == ("float32", 0.1, len(tiny.read_jsonl(base / "pairs.jsonl")))


def test_a_training_that_met_a_number_that_is_not_finite_goes_on_from_before_it(
    base, tmp_path, capsys, monkeypatch
):
    assert run_dpo(base, tmp_path / "straight") == 0
    sides, calls = reading.sides, []

    def poisoned(*args):
        calls.append(args)
        found = sides(*args)
        return found | ({"ref_chosen": found["ref_chosen"] * np.nan} if len(calls) == 3 else {})

    monkeypatch.setattr(reading, "sides", poisoned)
    refused(capsys, run_dpo(base, tmp_path / "out"), "step 2: loss or log-probs are not finite")
    monkeypatch.undo()
    assert run_dpo(base, tmp_path / "out") == 0
    assert "going on after step 1" in capsys.readouterr().out
    assert checkpoint.identity(str(tmp_path / "out")) == checkpoint.identity(
        str(tmp_path / "straight")
    )


def test_samplers_logprobs_that_are_not_the_models_stop_the_training(base, tmp_path, capsys):
    rows = tiny.read_jsonl(base / "pairs.jsonl")
    for row in rows:
        row["chosen_logprob"] -= 40
    tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    manifest = manifest_path(str(base / "pairs.jsonl"))
    (tmp_path / "p.jsonl.manifest.json").write_text(open(manifest).read())
    refused(capsys, run_dpo(base, tmp_path / "out", pairs=tmp_path / "p.jsonl"), "log-probs differ")


def test_a_line_that_was_mended_can_be_trained_on_at_once(base, tmp_path, capsys):
    rows = tiny.read_jsonl(base / "pairs.jsonl")
    tiny.write_jsonl(tmp_path / "p.jsonl", [*rows, {"prompt_id": "x", "prompt": "hi"}])
    code = run_dpo(base, tmp_path / "out", pairs=tmp_path / "p.jsonl")
    refused(capsys, code, f"line {len(rows) + 1}", "'chosen' is missing")
    tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    assert run_dpo(base, tmp_path / "out", pairs=tmp_path / "p.jsonl") == 0


def test_work_that_was_begun_is_not_gone_on_with_by_other_arguments(
    base, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Work, "log", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert run_dpo(base, tmp_path / "out") == 75
    capsys.readouterr()
    refused(capsys, run_dpo(base, tmp_path / "out", "--beta", "0.3"), "beta", "remove", "out.work")


# ------------------------------------------------------- what may not end or lose a training


SAVE = """
import os, signal, sys
from orbax.checkpoint._src.path import atomicity
from model import checkpoint_writing
import jax.numpy as jnp
how = sys.argv[2]

async def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if how == "kill":
    atomicity.AtomicRenameTemporaryPath.finalize = kill
else:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    checkpoint_writing.save_state(sys.argv[1], {"params": {"a": jnp.ones((100, 100))}})()
except OSError as error:
    assert error.filename == sys.argv[1] and "too large" in error.strerror
    sys.exit(3)
"""


@pytest.mark.parametrize("how", ["kill", "disk", "earlier version", "unknown"])
def test_a_save_that_was_cut_off_is_removed_and_the_run_goes_on(base, stopped, capsys, how):
    """Whatever lies there under the name of a state and is none."""
    work = f"{stopped}.work"
    if how in ("kill", "disk"):
        done = subprocess.run([sys.executable, "-c", SAVE, f"{work}/state-3", how])
        assert done.returncode == (-signal.SIGKILL if how == "kill" else 3)
    elif how == "earlier version":  # which let Orbax write to state-3.tmp, and renamed that
        os.makedirs(f"{work}/state-3.tmp.orbax-checkpoint-tmp")
        shutil.copytree(f"{work}/state-2", f"{work}/state-4.tmp")
    else:
        os.makedirs(f"{work}/state-x")
        os.makedirs(f"{work}/state-3")
    leftovers = [name for name in os.listdir(work) if name.startswith("state-")]
    assert len(leftovers) > 1
    log = Work.log

    def looking(self, step, values):
        log(self, step, values)
        assert self.states() == [2] and len(list(self.folder.glob("state-*"))) == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "log", looking)
        assert run_dpo(base, stopped) == 0
    assert "going on after step 2" in capsys.readouterr().out
    assert not os.path.exists(work)


@pytest.mark.parametrize(
    "save,path",
    [
        ("save_state", ".work/state-3"),
        pytest.param("save", "", marks=pytest.mark.heavy),
    ],
)
def test_a_full_disk_ends_a_training_with_one_line_and_it_goes_on(base, tmp_path, save, path):
    out = tmp_path / "out"
    limited = (
        "import resource, sys; from stages import dpo; from stages.files.run import run_main\n"
        f"from model import checkpoint_writing as writing; save = writing.{save}\n"
        "def full(*args, **more):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1))\n"
        "    return save(*args, **more)\n"
        f"writing.{save} = full; sys.exit(run_main(dpo.main, dpo.Args, sys.argv[1:]))"
    )
    argv = dpo_argv(base, out, "--save-every", "3", "--dtype", "float32")
    done = subprocess.run([sys.executable, "-c", limited, *argv], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert f"{out}{path}: " in line and "File too large" in line and "Traceback" not in done.stderr
    assert run_dpo(base, out) == 0


@pytest.mark.parametrize(
    "more",
    [
        ("--micro-batch-size", "2"),
        pytest.param(("--remat", "full", "--rows", "responses"), marks=pytest.mark.heavy),
        pytest.param(
            ("--mesh", "1", "4", "1", "--save-every", "1", "--keep-states", "2"),
            marks=pytest.mark.heavy,
        ),
    ],
    ids=lambda more: more[0],
)
def test_what_only_decides_where_and_how_fast_may_change_when_a_run_goes_on(
    base, stopped, tmp_path, capsys, more
):
    assert run_dpo(base, stopped, *more) == 0
    assert "going on after step 2" in capsys.readouterr().out
    assert run_dpo(base, tmp_path / "straight") == 0
    for a, b in zip(metrics(stopped), metrics(tmp_path / "straight"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    start, one, other = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(checkpoint.load(str(folder))[1])])
        for folder in (base / "model", stopped, tmp_path / "straight")
    )
    assert np.linalg.norm(one - other) < 1e-3 * np.linalg.norm(other - start)


def test_a_run_that_an_earlier_version_began_goes_on(base, stopped, capsys):
    file = f"{stopped}.work/manifest.json"
    manifest = json.loads(open(file).read())
    entries = manifest["inputs"].values()
    manifest["inputs"] = {entry["path"]: entry["sha256"] for entry in entries}
    manifest["arguments"] |= {"micro_batch_size": 1, "remat": "none", "rows": "packed"}
    with open(file, "w") as opened:
        json.dump(manifest, opened)
    refused(capsys, run_dpo(base, stopped, "--beta", "0.3"), "beta", "remove", "out.work")
    assert run_dpo(base, stopped) == 0
    assert "going on after step 2" in capsys.readouterr().out


def test_pairs_and_test_pairs_that_changed_places_are_another_run(base, tmp_path, capsys):
    other = ["--test-pairs", str(base / "pairs.test.jsonl")]
    assert run_dpo(base, tmp_path / "out", *other) == 0
    other = ["--test-pairs", str(base / "pairs.jsonl")]
    code = run_dpo(base, tmp_path / "out", *other, pairs=base / "pairs.test.jsonl")
    refused(capsys, code, "other arguments", "input")


def test_a_path_that_ends_in_a_slash_is_the_path(base, tmp_path):
    assert run_dpo(base, f"{tmp_path}/out/", model="model/") == 0
    names = sorted(name for name in os.listdir(tmp_path))
    assert names == ["out", "out.log"]
    assert checkpoint.read_manifest(str(tmp_path / "out"))["origin"]["stage"] == "dpo"


def test_what_is_in_the_way_is_refused_before_the_work_and_kept(base, tmp_path, capsys):
    def never(*_):
        raise AssertionError("the training began")

    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.work").mkdir()
    (tmp_path / "mine.work" / "thesis.tex").write_text("mine")
    (tmp_path / "file.log").write_text("mine")
    for name in ("metrics", "set_aside"):
        (tmp_path / f"{name}.log").mkdir()
        (tmp_path / f"{name}.log" / f"{name}.jsonl").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, *words in (
        (tmp_path / "metrics", "metrics.jsonl", "not of this stage"),
        (tmp_path / "set_aside", "set_aside.jsonl", "not of this stage"),
        (tmp_path / "link", "is a link to nothing"),
        (tmp_path / "folder", "is no checkpoint of this stage"),
        (base / "model", "is the input", "--checkpoint"),
        (tmp_path / "mine", "mine.work", "not of this stage"),
        (tmp_path / "file", "file.log"),
        (tmp_path / ("x" * 300), "x" * 300, "too long"),
        ("s3://bucket/out", "gs://"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "load", never)
            refused(capsys, run_dpo(base, out), *words)
    assert (tmp_path / "mine.work" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "file.log").read_text() == "mine"
    for name in ("metrics", "set_aside"):
        assert (tmp_path / f"{name}.log" / f"{name}.jsonl").read_text() == "mine"


def test_two_processes_do_not_write_one_out(base, tmp_path, capsys):
    with lock(str(tmp_path / "out")):
        refused(capsys, run_dpo(base, tmp_path / "out"), "out", "being written")
    assert run_dpo(base, tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path)) == ["out", "out.log"]


def test_kept_logprobs_are_of_this_version_and_of_these_pairs(base, tmp_path, capsys, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    shutil.copy(base / "pairs.jsonl", pairs)

    def trained(name):
        assert run_dpo(base, tmp_path / name, pairs=pairs) == 0
        return "computed before" in capsys.readouterr().out

    assert not trained("a") and trained("b")
    (kept,) = (tmp_path / "pairs.jsonl.reference").glob("*.npy")
    array = np.load(kept)
    for damaged in (array[:-1], array.astype(np.float64)):
        np.save(kept, damaged)
        assert not trained(f"{len(damaged)}-{damaged.dtype}")
        assert np.array_equal(np.load(kept), array)
    kept.write_bytes(b"")
    assert not trained("empty")
    monkeypatch.setattr(logprobs, "VERSION", -1)
    assert not trained("other version")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "other version")
    shutil.rmtree(tmp_path / "pairs.jsonl.reference")
    (tmp_path / "pairs.jsonl.reference").write_text("in the way")
    assert not trained("kept in OUT.work") and not (tmp_path / "kept in OUT.work.work").exists()


def test_an_answer_is_trained_with_the_end_that_was_drawn(base, tmp_path):
    row = {"prompt_id": "x", "prompt": "hi", "chosen": talk("a"), "rejected": talk("b")}
    row |= {"chosen_token_ids": [70], "chosen_end_token_id": 0, "rejected_token_ids": [71]}
    tokenizer = ChatTokenizer.from_folder(str(base / "model"), (2, 0))
    tiny.write_jsonl(tmp_path / "p.jsonl", [row])
    (example,), _ = read_pairs(str(tmp_path / "p.jsonl"), tokenizer, tiny.VOCABULARY, 1024, 512, [])
    assert example.chosen.tolist() == [70, 0] and example.rejected.tolist() == [71, 2]


def test_pairs_whose_answers_are_to_other_conversations_are_set_aside_and_counted(base, tmp_path):
    asked = {"prompt_id": "1", "prompt": "hi", "chosen": talk("a"), "rejected": talk("b")}
    rows = [
        asked,
        asked | {"prompt_id": "2", "rejected": talk("b", "else")},
        asked | {"prompt_id": "3", "chosen": talk("y", "x") + talk("a")},
        asked | {"prompt_id": "4", "chosen": talk("a", "x"), "rejected": talk("b", "x")},
        asked,
    ]
    tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    assert run_dpo(base, tmp_path / "out", pairs=tmp_path / "p.jsonl") == 0
    counts = checkpoint.read_manifest(str(tmp_path / "out"))["origin"]["counts"]
    assert counts["in"] == 5 and sum(counts.values()) == 5 + 4  # one merged, three set aside
    aside = tiny.read_jsonl(f"{tmp_path / 'out'}.log/set_aside.jsonl")
    assert [row["prompt_id"] for row in aside] == ["2", "3", "4"]


def test_a_signal_during_the_reference_pass_stops_at_its_next_batch(base, tmp_path, monkeypatch):
    made = []

    def signalled(self, examples, indices, pack=Batcher.pack):
        made.append(indices)
        if len(made) == 2:  # the first is the longest micro-batch, for the table of arrays
            os.kill(os.getpid(), signal.SIGTERM)
        return pack(self, examples, indices)

    monkeypatch.setattr(Batcher, "pack", signalled)
    assert run_dpo(base, tmp_path / "out") == 75
    assert not list(tmp_path.glob("out.work/reference/*"))
    monkeypatch.undo()
    assert run_dpo(base, tmp_path / "out") == 0
