"""What a model answers to a benchmark, and how far it is from another, with tiny models."""

import gc
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import torch
import transformers

from model import checkpoint, decoder
from model.checkpoint_writing import save
from scripts import convert
from stages import rank, sample
from stages.evaluate import __main__ as evaluate
from stages.files.output import Manifest, Output, manifest_path, read_manifest
from tests import tiny
from tests.stages.test_evaluate import error_line, run

REWARD = "def reward(prompt, responses): return [float(r.count('e')) for r in responses]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, one that differs a little, prompts, and the first one's answers to them."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.write_checkpoint(folder / "model")
    tiny.write_tokenizer(folder / "other-tokenizer")
    config = checkpoint.load_config(str(folder / "model"))
    params = jax.tree.map(lambda x: 1.05 * x, tiny.params(config, 0))
    save(str(folder / "other"), config, params, str(folder / "other-tokenizer"), {})
    (folder / "reward.py").write_text(REWARD)
    prompts = tiny.write_jsonl(folder / "prompts.jsonl", tiny.PROMPTS)
    sample.main(
        sample.Args(
            str(folder / "model"),
            prompts,
            str(folder / "samples.jsonl"),
            n=3,
            temperature=1.0,
            top_p=1.0,
            max_new_tokens=12,
            slots=8,
            mesh=(1, 1, 4),
        )
    )
    return folder


def argv(folder, out, *more):
    return [
        "outputs",
        "--checkpoint",
        folder / "model",
        "--benchmark",
        folder / "prompts.jsonl",
        "--out",
        out,
        "--temperature",
        "1",
        "--top-p",
        "1",
        "--max-new-tokens",
        "12",
        "--slots",
        "8",
        "--mesh",
        "1",
        "1",
        "4",
        "--dtype",
        "float32",
        *more,
    ]


def test_outputs_are_the_samplers_answers_in_alpaca_evals_form(folder, tmp_path):
    assert run(*argv(folder, tmp_path / "m.json")) == 0
    answers = json.loads((tmp_path / "m.json").read_text())
    sampled = tiny.read_jsonl(folder / "samples.jsonl")
    assert [a["instruction"] for a in answers] == [p["prompt"] for p in tiny.PROMPTS]
    # The first of three answers is the answer: what is drawn hangs on prompt and index alone.
    assert [a["output"] for a in answers] == [r["responses"][0]["text"] for r in sampled]
    assert {a["generator"] for a in answers} == {"model"}
    assert answers[0].keys() == {"instruction", "output", "generator", "dataset", "finish_reason"}
    manifest = read_manifest(str(tmp_path / "m.json"))
    assert manifest.counts == {"in": 7, "out": 7}
    assert manifest.identities["model"] == checkpoint.identity(str(folder / "model"))


def test_best_of_n_keeps_the_rankers_best_and_all_answers(folder, tmp_path):
    ranker = ("--best-of", 3, "--ranker", f"{folder}/reward.py:reward")
    assert run(*argv(folder, tmp_path / "m.json", *ranker)) == 0
    answers = json.loads((tmp_path / "m.json").read_text())
    ranked = tiny.read_jsonl(tmp_path / "m.ranked.jsonl")
    sampled = tiny.read_jsonl(folder / "samples.jsonl")
    for answer, row, theirs in zip(answers, ranked, sampled):
        texts = [response["text"] for response in theirs["responses"]]
        assert [response["text"] for response in row["responses"]] == texts
        assert row["scores"] == [text.count("e") for text in texts]
        assert answer["output"] == max(texts, key=lambda text: text.count("e"))
    assert {answer["generator"] for answer in answers} == {"model-best-of-3"}
    text = (tmp_path / "m.json").read_bytes()
    (tmp_path / "m.json").unlink()
    assert run(*argv(folder, tmp_path / "m.json", *ranker)) == 0
    assert (tmp_path / "m.json").read_bytes() == text


def test_the_benchmark_is_never_written_over(folder, tmp_path, capsys):
    for name in ("m.samples.jsonl", "m.ranked.jsonl", "m.prompts.jsonl"):
        benchmark = tmp_path / name
        tiny.write_jsonl(benchmark, tiny.PROMPTS)
        before = benchmark.read_bytes()
        more = ("--benchmark", benchmark, "--overwrite")
        assert run(*argv(folder, tmp_path / "m.json", *more)) == 2
        assert "is the input (--benchmark)" in error_line(capsys)
        assert benchmark.read_bytes() == before


def test_what_is_in_the_way_is_found_before_hours_of_sampling(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sample, "main", lambda args: pytest.fail("sampled"))
    best = ("--best-of", "2", "--ranker", f"{folder}/reward.py:reward")
    mine, pipe, out = tmp_path / "mine.json", tmp_path / "pipe.json", tmp_path / "m.json"
    mine.write_text("[]")
    os.mkfifo(pipe)
    (tmp_path / "folder.json").mkdir()
    for name, made in (
        ("judged", Manifest("evaluate judge", {}, {}, {})),
        ("named", Manifest("evaluate outputs", {"generator": "other", "best_of": 2}, {}, {})),
    ):
        (tmp_path / f"{name}.json").write_text("[]")
        made.write(manifest_path(str(tmp_path / f"{name}.json")))
    tiny.write_jsonl(tmp_path / "m.ranked.jsonl", [])
    for place, more, words in (
        (mine, [], "has no manifest"),
        (pipe, ["--overwrite"], "is no regular file"),
        (tmp_path / "folder.json", ["--overwrite"], "is a folder"),
        (tmp_path / "judged.json", [], 'stage "evaluate judge" there'),
        (tmp_path / "named.json", [], 'generator "other" there'),
        (out, [], "m.ranked.jsonl exists and has no manifest"),
    ):
        assert run(*argv(folder, place, *best, *more)) == 2
        assert words in error_line(capsys)
    assert mine.read_text() == "[]" and pipe.is_fifo()
    assert not list(tmp_path.glob("*.prompts.jsonl*"))


def test_an_instruction_without_an_answer_fails(folder, tmp_path, capsys):
    prompts = [*tiny.PROMPTS, {"prompt": "words " * 90}]  # beyond the context of 256 tokens
    tiny.write_jsonl(tmp_path / "prompts.jsonl", prompts)
    more = ("--benchmark", tmp_path / "prompts.jsonl")
    assert run(*argv(folder, tmp_path / "m.json", *more)) == 2
    assert "1 of 8 instructions have no answer" in error_line(capsys)
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--best-of", "3"], "go together"),
        (["--ranker", "x.py:y"], "go together"),
        (["--best-of", "2", "--ranker", "/no/folder"], "neither a folder nor a hub id"),
        (["--best-of", "2", "--ranker", "none.py:f"], "does not exist"),
        (["--benchmark", "/no/file"], "does not exist"),
        (["--out", "m.jsonl"], "a .json file"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(folder, tmp_path, capsys, more, words):
    assert run(*argv(folder, tmp_path / "m.json", *more)) == 2
    assert words in error_line(capsys)


def test_the_model_is_freed_before_the_ranker_comes(folder, tmp_path, monkeypatch):
    """sample, then rank, in one process; between them no array of the model is left."""
    model = decoder.abstract(checkpoint.load_config(str(folder / "model")))
    shapes = {leaf.shape for leaf in jax.tree.leaves(model) if len(leaf.shape) > 1}
    calls = []
    earlier = jax.live_arrays()  # of other tests; kept here, so that their ids stay their own
    known = {id(array) for array in earlier}

    def model_arrays() -> list:
        arrays = (array for array in jax.live_arrays() if id(array) not in known)
        return [array for array in arrays if array.shape in shapes]

    def sampling(args, real=sample.main):
        assert not model_arrays()
        real(args)
        calls.append("sample")

    def ranking(args, real=rank.main):
        assert not model_arrays()
        real(args)
        calls.append("rank")

    loaded = []

    def loading(*args, real=checkpoint.load):
        config, params = real(*args)
        loaded.append(len(model_arrays()))
        return config, params

    monkeypatch.setattr(checkpoint, "load", loading)
    monkeypatch.setattr(sample, "main", sampling)
    monkeypatch.setattr(rank, "main", ranking)
    monkeypatch.setattr(subprocess, "Popen", None)  # no child processes
    ranker = ("--best-of", 3, "--ranker", f"{folder}/reward.py:reward")
    assert run(*argv(folder, tmp_path / "m.json", *ranker)) == 0
    assert calls == ["sample", "rank"] and len(loaded) == 1
    assert loaded[0] >= len([leaf for leaf in jax.tree.leaves(model) if len(leaf.shape) > 1])


@pytest.mark.parametrize("during", ["sampling", "ranking", "neither"])
def test_a_signal_stops_with_75_and_the_same_command_goes_on(folder, tmp_path, monkeypatch, during):
    ranker = ("--best-of", 3, "--ranker", f"{folder}/reward.py:reward")
    command = argv(folder, tmp_path / "m.json", *ranker)
    ending = {"sampling": "samples.jsonl", "ranking": "ranked.jsonl"}.get(during)

    def stopping(self, row, real=Output.write):
        real(self, row)
        if ending is not None and self.path.endswith(ending) and len(self) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Output, "write", stopping)
    if during == "neither":
        monkeypatch.setattr(gc, "collect", lambda: os.kill(os.getpid(), signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    assert run(*command) == 75
    assert signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.undo()
    gc.collect()  # the stopped run's hold on its file; a process of its own ends with it
    left = {path.name for path in tmp_path.iterdir()}
    assert ("m.samples.jsonl" in left) == (during != "sampling") and "m.json" not in left
    assert run(*command) == 0
    answers = json.loads((tmp_path / "m.json").read_text())
    sampled = tiny.read_jsonl(folder / "samples.jsonl")
    texts = [[r["text"] for r in row["responses"]] for row in sampled]
    assert [a["output"] for a in answers] == [max(t, key=lambda x: x.count("e")) for t in texts]


@pytest.mark.heavy
def test_stopped_while_sampling_it_goes_on_to_the_same_answers(folder, tmp_path):
    rows = [{"prompt": f"Say {i}, please."} for i in range(60)]
    tiny.write_jsonl(tmp_path / "prompts.jsonl", rows)
    words = map(
        str,
        argv(
            folder,
            tmp_path / "m.json",
            "--benchmark",
            tmp_path / "prompts.jsonl",
            "--mesh",
            1,
            -1,
            1,
            "--slots",
            4,
        ),
    )
    command = [sys.executable, "-m", "stages.evaluate", *words]
    process = subprocess.Popen(command)
    partial = tmp_path / "m.samples.jsonl.partial"
    end = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert 0 < len(partial.read_text().splitlines()) < 60
    assert subprocess.run(command).returncode == 0
    answers = json.loads((tmp_path / "m.json").read_text())
    assert [answer["instruction"] for answer in answers] == [row["prompt"] for row in rows]
    assert os.listdir(tmp_path).count("m.samples.jsonl.partial") == 0


@pytest.mark.heavy
def test_processes_that_slurm_started_answer_together(folder, tmp_path):
    """--coordinator auto: who is who stands in SLURM's environment."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": "2", "XLA_FLAGS": tiny.xla_flags(1)}
    ranker = ("--best-of", 3, "--ranker", f"{folder}/reward.py:reward", "--mesh", 1, -1, 1)
    words = map(str, argv(folder, tmp_path / "m.json", *ranker, "--coordinator", "auto"))
    command = [sys.executable, "-m", "stages.evaluate", *words]
    running = [
        subprocess.Popen(command, env=os.environ | job | {"SLURM_PROCID": i, "SLURM_LOCALID": i})
        for i in ("0", "1")
    ]
    assert [process.wait() for process in running] == [0, 0]
    answers = json.loads((tmp_path / "m.json").read_text())
    sampled = tiny.read_jsonl(folder / "samples.jsonl")
    texts = [[r["text"] for r in row["responses"]] for row in sampled]
    assert [a["output"] for a in answers] == [max(t, key=lambda x: x.count("e")) for t in texts]
    assert not list(tmp_path.glob("*share*"))


# --------------------------------------------------------------------------------------- kl


def kl(folder, tmp_path, name, *more):
    code = run(
        "kl",
        "--checkpoint",
        folder / name,
        "--samples",
        folder / "samples.jsonl",
        "--out",
        tmp_path / f"{name}.json",
        "--mesh",
        1,
        1,
        4,
        *more,
    )
    assert code == 0
    return json.loads((tmp_path / f"{name}.json").read_text())


def test_a_model_is_at_no_distance_from_itself(folder, tmp_path):
    found = kl(folder, tmp_path, "model")
    assert found["kl_per_token"] == pytest.approx(0, abs=1e-5)
    assert (found["n"], found["prompts"]) == (21, 7)
    assert found["drawn_with"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


def test_the_distance_is_that_of_transformers_log_probs(folder, tmp_path):
    found = kl(folder, tmp_path, "other", "--batch-size", 6)
    convert.to_hf(convert.ToHf(str(folder / "other"), str(tmp_path / "hf"), dtype="float32"))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    eos = checkpoint.load_config(str(folder / "other")).eos_token_ids[0]
    ahead, tokens = [], []
    for row in tiny.read_jsonl(folder / "samples.jsonl"):
        mine, count = 0.0, 0
        for response in row["responses"]:
            answer = response["token_ids"] + [eos] * (response["finish_reason"] == "stop")
            ids = torch.tensor([row["prompt_token_ids"] + answer])
            with torch.no_grad():
                logprobs = torch.log_softmax(reference(ids).logits[0, -len(answer) - 1 : -1], -1)
            chosen = logprobs[torch.arange(len(answer)), torch.tensor(answer)]
            mine += response["logprob"] - float(chosen.sum())
            count += len(answer)
        ahead.append(mine)
        tokens.append(count)
    ahead, tokens = np.array(ahead), np.array(tokens)
    assert found["tokens"] == tokens.sum()
    assert found["kl_per_token"] == pytest.approx(ahead.sum() / tokens.sum(), abs=1e-5)
    assert found["kl_per_answer"] == pytest.approx(ahead.sum() / 21, abs=1e-4)
    assert found["kl_per_answer"] > 0
    # Jackknife over prompts, another way to the ratio's error.
    left_out = [(ahead.sum() - a) / (tokens.sum() - t) for a, t in zip(ahead, tokens)]
    error = np.sqrt(6 / 7 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    assert found["standard_error"] == pytest.approx(error, rel=0.3)


def test_kl_of_the_first_prompts_alone(folder, tmp_path, capsys):
    found = kl(folder, tmp_path, "other", "--prompts", 3)
    rows = tiny.read_jsonl(folder / "samples.jsonl")[:3]
    tiny.write_jsonl(tmp_path / "three.jsonl", rows)
    three = tmp_path / "three.json"
    assert (
        run(
            "kl",
            "--checkpoint",
            folder / "other",
            "--samples",
            tmp_path / "three.jsonl",
            "--out",
            three,
            "--mesh",
            1,
            1,
            4,
        )
        == 0
    )
    assert found["kl_per_token"] == json.loads(three.read_text())["kl_per_token"]
    assert (found["prompts"], found["first_prompts"]) == (3, 3)
    manifest = read_manifest(str(tmp_path / "other.json"))
    assert manifest.arguments["prompts"] == 3 and manifest.counts == {"in": 3, "out": 3}
    command = ("kl", "--checkpoint", folder / "other", "--samples", folder / "samples.jsonl")
    assert run(*command, "--out", tmp_path / "other.json", "--prompts", 4) == 2
    assert "arguments.prompts 3 there, 4 here" in error_line(capsys)
    assert run(*command, "--out", tmp_path / "new.json", "--prompts", 0) == 2
    assert "--prompts is 0: it must be at least 1" in error_line(capsys)


def test_kl_goes_on_after_a_stop(folder, tmp_path, monkeypatch):
    whole = kl(folder, tmp_path, "other", "--batch-size", 6)
    (tmp_path / "other.json").unlink()
    write = Output.write

    def stopping(self, row):
        write(self, row)
        if len(self) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Output, "write", stopping)
    command = (
        "kl",
        "--checkpoint",
        folder / "other",
        "--samples",
        folder / "samples.jsonl",
        "--mesh",
        1,
        1,
        4,
        "--batch-size",
        6,
        "--out",
        tmp_path / "other.json",
    )
    assert run(*command) == 75
    monkeypatch.undo()
    assert len((tmp_path / "other.json.partial").read_text().splitlines()) == 2
    gc.collect()  # the stopped run's hold on its file; a process of its own ends with it
    found = kl(folder, tmp_path, "other", "--batch-size", 6)
    assert found["n"] == 21
    assert found == whole  # bit by bit


def test_kl_refuses_samples_of_another_tokenizer_and_rows_without_logprobs(
    folder, tmp_path, capsys
):
    (tmp_path / "s.jsonl").write_text((folder / "samples.jsonl").read_text())
    manifest = read_manifest(str(folder / "samples.jsonl"))
    manifest.identities["tokenizer"] = "another"
    manifest.write(manifest_path(str(tmp_path / "s.jsonl")))
    command = (
        "kl",
        "--checkpoint",
        folder / "model",
        "--samples",
        tmp_path / "s.jsonl",
        "--out",
        tmp_path / "k.json",
    )
    assert run(*command) == 2
    assert "another tokenizer" in error_line(capsys)
    row = tiny.read_jsonl(folder / "samples.jsonl")[0]
    del row["responses"][1]["logprob"]
    tiny.write_jsonl(tmp_path / "s.jsonl", [row])
    os.unlink(manifest_path(str(tmp_path / "s.jsonl")))
    assert run(*command) == 2
    assert "responses[1]: field 'logprob' is missing" in error_line(capsys)


def test_the_command_line_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert all(command.__name__.lower() in text for command in evaluate.COMMANDS)
