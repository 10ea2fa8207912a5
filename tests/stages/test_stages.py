"""The stages through their command lines: the whole chain, resuming, and the caller's mistakes."""

import json
import math
import os
import signal

import numpy as np
import pytest

from model import checkpoint
from scripts import cards
from sharding.errors import UserError
from stages import dpo, pairs, rank, sample
from stages.files.examples import read_pairs, template_head
from stages.files.output import Output, manifest_path, read_manifest
from stages.files.run import parse_bytes, run_main
from tests import tiny

REWARD = """
def reward(prompt, responses):
    return [len(set(r)) / 10 for r in responses]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a checkpoint, prompts and a reward, and all stages' files but the training."""
    folder = tmp_path_factory.mktemp("base")
    tiny.write_checkpoint(folder / "model")
    tiny.write_checkpoint(folder / "other", seed=1)
    tiny.write_jsonl(folder / "prompts.jsonl", tiny.PROMPTS)
    (folder / "reward.py").write_text(REWARD)
    assert run_sample(folder) == 0
    assert run_rank(folder) == 0
    argv = ["--ranked", str(folder / "ranked.jsonl"), "--out", str(folder / "pairs.jsonl")]
    assert run_main(pairs.main, pairs.Args, [*argv, "--test-count", "2"]) == 0
    return folder


def run_sample(folder, *more, out="samples.jsonl", prompts="prompts.jsonl", model="model"):
    argv = [
        "--checkpoint",
        str(folder / model),
        "--prompts",
        str(folder / prompts),
        "--out",
        str(folder / out),
        "--n",
        "3",
        "--max-new-tokens",
        "12",
        "--temperature",
        "1",
        "--slots",
        "4",
        *more,
    ]
    return run_main(sample.main, sample.Args, argv)


def run_rank(folder, *more, ranker=None, out="ranked.jsonl", samples="samples.jsonl"):
    argv = [
        "--ranker",
        ranker or f"{folder / 'reward.py'}:reward",
        "--samples",
        str(folder / samples),
        "--out",
        str(folder / out),
        *more,
    ]
    return run_main(rank.main, rank.Args, argv)


def run_dpo(folder, out, *more, pairs="pairs.jsonl", model="model"):
    argv = [
        "--checkpoint",
        str(folder / model),
        "--pairs",
        str(folder / pairs),
        "--out",
        str(out),
        "--learning-rate",
        "1e-3",
        "--batch-size",
        "2",
        "--micro-batch-size",
        "1",
        "--epochs",
        "2",
        "--warmup-ratio",
        "0",
        "--max-length",
        "128",
        "--max-prompt-length",
        "96",
        "--mesh",
        "1",
        "1",
        "-1",
        *more,
    ]
    return run_main(dpo.main, dpo.Args, argv)


def metrics(out):
    """A training's metrics, but for those of time and memory."""
    measured = {"host_wait", "tokens_per_second", "model_flops_per_second", "peak_memory_gb"}
    rows = tiny.read_jsonl(f"{out}.log/metrics.jsonl")
    assert all(row.keys() >= measured for row in rows if "loss" in row)
    return [{name: x for name, x in row.items() if name not in measured} for row in rows]


def refused(capsys, code, *words):
    """The command ended with 2 and one line on stderr that holds the words."""
    assert code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]


# ------------------------------------------------------------------------------ the chain


def test_every_stage_hands_on_the_rows_their_tokens_and_their_lineage(base):
    samples, ranked = (tiny.read_jsonl(base / f"{n}.jsonl") for n in ("samples", "ranked"))
    assert [r["prompt"] for r in samples] == [p["prompt"] for p in tiny.PROMPTS]
    assert all(len(r["responses"]) == 3 and len(r["scores"]) == 3 for r in ranked)
    made = tiny.read_jsonl(base / "pairs.jsonl")
    by_id = {r["prompt_id"]: r for r in ranked}
    for pair in made:
        row = by_id[pair["prompt_id"]]
        chosen = row["responses"][pair["chosen_index"]]
        assert pair["chosen_token_ids"] == chosen["token_ids"]
        assert pair["chosen_logprob"] == chosen["logprob"]
        assert pair["all_rm_scores"] == row["scores"]
        assert row["scores"][pair["chosen_index"]] == max(row["scores"])
    identity = checkpoint.identity(str(base / "model"))
    lineage = read_manifest(str(base / "pairs.jsonl"))
    assert lineage.identities["model"] == identity and "ranker" in lineage.identities


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
    assert run_dpo(base, out, "--test-pairs", str(base / "pairs.test.jsonl"), "--epochs", "8") == 0
    assert "finished already" in capsys.readouterr().out
    # The trained checkpoint is a model like any other.
    assert run_sample(base, model=out, out="again.jsonl") == 0


@pytest.mark.parametrize("micro", ["2", "3"])
def test_micro_batches_only_cut_the_sum(base, tmp_path, micro):
    assert run_dpo(base, tmp_path / "a", "--batch-size", "3") == 0
    assert run_dpo(base, tmp_path / "b", "--batch-size", "3", "--micro-batch-size", micro) == 0
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_devices_only_share_the_work(base, tmp_path):
    assert run_dpo(base, tmp_path / "a") == 0
    assert run_dpo(base, tmp_path / "b", "--mesh", "1", "4", "1") == 0
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.parametrize("how", ["signal", "kill after a save", "kill before any save"])
def test_a_training_that_was_stopped_ends_bit_identical(base, tmp_path, how, monkeypatch, capsys):
    test = ["--test-pairs", str(base / "pairs.test.jsonl")]
    assert run_dpo(base, tmp_path / "straight", *test) == 0
    log = dpo.Run._log

    def stopping(self, step, values):
        log(self, step, values)
        if step == 3:
            if how == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise MemoryError("stands for a kill")

    monkeypatch.setattr(dpo.Run, "_log", stopping)
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
    assert [r["step"] for r in metrics(tmp_path / "out") if "eval_loss" in r] == [0, 4]
    results = checkpoint.read_manifest(str(tmp_path / "out"))["origin"]["results"]
    assert results["sampler_disagreement"] < 1e-3 and results["steps"] == 4


def test_sampling_that_was_stopped_goes_on_and_ends_with_the_same_answers(
    base, tmp_path, monkeypatch, capsys
):
    write = Output.write

    def stopping(self, row):
        write(self, row)
        if len(self) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Output, "write", stopping)
    assert run_sample(base, out=tmp_path / "s.jsonl") == 75
    assert not (tmp_path / "s.jsonl").exists()
    monkeypatch.undo()
    assert run_sample(base, out=tmp_path / "s.jsonl") == 0
    assert "going on after" in capsys.readouterr().out
    for a, b in zip(
        tiny.read_jsonl(tmp_path / "s.jsonl"), tiny.read_jsonl(base / "samples.jsonl"), strict=True
    ):
        for x, y in zip(a["responses"], b["responses"], strict=True):
            assert (x["token_ids"], x["finish_reason"]) == (y["token_ids"], y["finish_reason"])
            assert x["logprob"] == pytest.approx(y["logprob"], abs=1e-4)


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
            "chosen": talk("yes " * 40),
            "rejected": talk("no"),
        },
        {"prompt_id": "short", "prompt": "hi", "chosen": talk("a"), "rejected": talk("b")},
    ]
    tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    from model.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer.from_folder(str(base / "model"), (2,))
    examples, counts = read_pairs(str(tmp_path / "p.jsonl"), tokenizer, tiny.VOCABULARY, 80, 40, [])
    assert counts == {"in": 2, "prompts cut": 1, "responses cut": 1}
    whole = tokenizer.prompt_ids([{"role": "user", "content": rows[0]["prompt"]}])
    empty = tokenizer.prompt_ids([{"role": "user", "content": "a"}])
    head = template_head(tokenizer)
    cut = examples[0].prompt.tolist()
    assert len(cut) == 40 and cut[:head] == whole[:head] and cut[head:] == whole[-(40 - head) :]
    assert cut[-5:] == empty[-5:]
    assert len(examples[0].prompt) + len(examples[0].chosen) == 80
    assert examples[0].rejected[-1] == 2  # EOS: a text without token ids counts as ended
    assert examples[0].chosen[-1] != 2  # …but not where its end was cut off


def talk(text):
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]


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
    from model.tokenizer import ChatTokenizer

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


# ------------------------------------------------------------------- the caller's mistakes


def test_a_checkpoint_folder_that_is_incomplete_is_refused(base, tmp_path, capsys):
    refused(capsys, run_sample(base, model="nowhere"), "nowhere", "does not exist")
    broken = tmp_path / "broken"
    tiny.write_checkpoint(broken)
    (broken / "tokenizer_config.json").unlink()
    refused(capsys, run_sample(base, model=broken), "broken", "tokenizer_config.json is missing")
    (broken / "tokenizer_config.json").write_text("{}")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "yarn"}}))
    refused(capsys, run_sample(base, model=broken), "rope_scaling")


def test_pairs_of_another_model_are_refused_unless_the_flag_says_otherwise(base, tmp_path, capsys):
    out = tmp_path / "out"
    refused(capsys, run_dpo(base, out, model="other"), "another model", "--allow-other-model")
    assert not out.exists()


def test_an_output_from_other_arguments_is_refused_and_kept(base, tmp_path, capsys):
    before = (base / "samples.jsonl").read_bytes()
    refused(capsys, run_sample(base, "--temperature", "0.5"), "temperature", "--overwrite")
    assert run_sample(base) == 0
    assert (base / "samples.jsonl").read_bytes() == before
    assert run_dpo(base, tmp_path / "out") == 0
    refused(capsys, run_dpo(base, tmp_path / "out", "--beta", "0.2"), "beta", "another --out")


@pytest.mark.parametrize(
    "body,word",
    [
        ("raise KeyError('x')", "KeyError"),
        ("return [1.0]", "1 scores for 3 responses"),
        ("return [float('nan')] * len(responses)", "not finite"),
        ("return None", "not a list of numbers"),
    ],
)
def test_a_reward_that_fails_names_the_prompt_and_keeps_what_was_ranked(
    base, tmp_path, capsys, body, word
):
    third = tiny.PROMPTS[2]["prompt"]
    source = f"def f(prompt, responses):\n    if prompt == {third!r}:\n        {body}\n"
    (tmp_path / "r.py").write_text(f"{source}    return [0.0, 1.0, 2.0]\n")
    code = run_rank(base, ranker=f"{tmp_path / 'r.py'}:f", out=tmp_path / "ranked.jsonl")
    prompt_id = tiny.read_jsonl(base / "samples.jsonl")[2]["prompt_id"]
    refused(capsys, code, prompt_id, word)
    kept = tiny.read_jsonl(f"{tmp_path / 'ranked.jsonl'}.partial")
    assert len(kept) == 2 and not (tmp_path / "ranked.jsonl").exists()


def test_a_ranker_that_cannot_be_opened_is_refused(base, tmp_path, capsys):
    (tmp_path / "r.py").write_text("import nothing_of_that_name")
    for ranker, word in (
        (f"{tmp_path / 'none.py'}:f", "does not exist"),
        (f"{tmp_path / 'r.py'}:f", "nothing_of_that_name"),
        (f"{base / 'reward.py'}:missing", "no function 'missing'"),
        ("llm-blender/PairRM", "PairRM"),
    ):
        refused(capsys, run_rank(base, ranker=ranker, out=tmp_path / "x.jsonl"), word)


def test_a_reward_gets_finish_reasons_where_it_asks_and_its_terms_are_recorded(base, tmp_path):
    (tmp_path / "r.py").write_text(
        "def f(prompt, responses, finish_reasons):\n"
        "    return [float(r == 'stop') for r in finish_reasons]\n"
        "f.terms = lambda prompt, response, finish_reason: {'words': len(response.split())}\n"
    )
    code = run_rank(base, ranker=f"{tmp_path / 'r.py'}:f", out=tmp_path / "ranked.jsonl")
    assert code == 0
    for row in tiny.read_jsonl(tmp_path / "ranked.jsonl"):
        stops = [float(r["finish_reason"] == "stop") for r in row["responses"]]
        assert row["scores"] == stops
        words = [{"words": len(r["text"].split())} for r in row["responses"]]
        assert row["score_terms"] == words


def test_a_prompt_longer_than_the_context_is_set_aside_and_counted(base, tmp_path):
    rows = [*tiny.PROMPTS[:2], {"prompt": "x" * 400}]
    tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    assert run_sample(base, prompts=tmp_path / "p.jsonl", out=tmp_path / "s.jsonl") == 0
    counts = read_manifest(str(tmp_path / "s.jsonl")).counts
    assert counts == {"in": 3, "out": 2, "set aside: prompt longer than 244 tokens": 1}
    (aside,) = tiny.read_jsonl(tmp_path / "s.jsonl.set_aside.jsonl")
    assert aside["reason"] == "prompt longer than 244 tokens"


def test_shares_make_the_same_file_as_one_process(base, tmp_path, capsys):
    rows = [*tiny.PROMPTS[:5], {"prompt": "x" * 400}, tiny.PROMPTS[0], tiny.PROMPTS[6]]
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    assert run_sample(base, prompts=prompts, out=tmp_path / "whole.jsonl") == 0
    out = tmp_path / "s.jsonl"
    for share in (2, 0, 1):
        assert not out.exists()
        assert run_sample(base, "--share", str(share), "3", prompts=prompts, out=out) == 0
        said = capsys.readouterr().out
        assert ("waits for share" in said) == (share != 1)
    for end in ("", ".set_aside.jsonl"):
        shared, whole = (tiny.read_jsonl(f"{p}{end}") for p in (out, tmp_path / "whole.jsonl"))
        for one, other in zip(shared, whole, strict=True):
            for a, b in zip(one.pop("responses", []), other.pop("responses", []), strict=True):
                assert a.pop("logprob") == pytest.approx(b.pop("logprob"), abs=1e-4)
                assert a == b
            assert one == other
    counts = read_manifest(str(out)).counts
    assert counts == read_manifest(str(tmp_path / "whole.jsonl")).counts
    assert counts["in"] == 8 and counts["out"] == 6
    assert not list(tmp_path.glob("*share*")) and not list(tmp_path.glob("*partial*"))
    assert run_sample(base, "--share", "1", "3", prompts=prompts, out=out) == 0
    assert "finished already" in capsys.readouterr().out


def test_the_cache_memory_decides_the_slots(base, tmp_path, capsys):
    # A slot: 2 layers × keys and values × 2 heads × 8 × positions × 4 bytes.
    positions = 12 + max(
        len(r["prompt_token_ids"]) for r in tiny.read_jsonl(base / "samples.jsonl")
    )
    memory = 5 * 2 * 2 * 2 * 8 * positions * 4 + 100
    argv = ["--checkpoint", str(base / "model"), "--prompts", str(base / "prompts.jsonl")]
    argv += ["--n", "3", "--max-new-tokens", "12", "--mesh", "1", "1", "-1", "--out"]
    more = [f"{tmp_path}/s.jsonl", "--cache-memory", f"{memory}"]
    assert run_main(sample.main, sample.Args, argv + more) == 0
    last = read_manifest(str(tmp_path / "s.jsonl")).results["last_sitting"]
    assert last["slots"] == 5
    argv += [f"{tmp_path}/t.jsonl", "--cache-memory", "1000"]
    code = run_main(sample.main, sample.Args, argv)
    refused(capsys, code, "raise --cache-memory")


@pytest.mark.parametrize("text,size", [("8GiB", 8 << 30), ("1.5 MB", 1_500_000), ("77", 77)])
def test_sizes_are_read_with_their_units(text, size):
    assert parse_bytes(text, "--cache-memory") == size


@pytest.mark.parametrize(
    "flags,word",
    [
        (["--n", "0"], "n is 0"),
        (["--top-p", "2"], "top_p"),
        (["--max-new-tokens", "999"], "room"),
        (["--slots", "0"], "slots"),
        (["--mesh", "3", "1", "1"], "mesh"),
        (["--cache-memory", "1GiB"], "twice"),
        (["--share", "3", "3"], "--share"),
        (["--min-p", "1"], "min_p"),
    ],
)
def test_sampling_settings_that_make_no_sense_are_refused(base, tmp_path, capsys, flags, word):
    refused(capsys, run_sample(base, *flags, out=tmp_path / "s.jsonl"), word)


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


def test_values_that_are_not_finite_stop_the_training_and_name_the_pairs():
    values = {"loss": [0.1, float("nan"), 0.2], "logps/chosen": [1.0, 2.0, float("-inf")]}
    with pytest.raises(UserError, match=r"step 5: .* prompt_id b, c: lower"):
        dpo._check_finite(4, values, ["a", "b", "c"])
    dpo._check_finite(4, {"loss": [0.1, 0.2]}, ["a", "b"])


def test_a_training_that_met_a_number_that_is_not_finite_goes_on_from_before_it(
    base, tmp_path, capsys, monkeypatch
):
    assert run_dpo(base, tmp_path / "straight") == 0
    sides, calls = dpo.Run._sides, []

    def poisoned(self, *args):
        calls.append(args)
        found = sides(self, *args)
        return found | ({"ref_chosen": found["ref_chosen"] * np.nan} if len(calls) == 3 else {})

    monkeypatch.setattr(dpo.Run, "_sides", poisoned)
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
    monkeypatch.setattr(dpo.Run, "_log", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert run_dpo(base, tmp_path / "out") == 75
    capsys.readouterr()
    refused(capsys, run_dpo(base, tmp_path / "out", "--beta", "0.3"), "beta", "remove", "out.work")
