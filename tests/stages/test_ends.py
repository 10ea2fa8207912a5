"""Models with several EOS ids, and ids beyond the vocabulary, from the sampler to the trainer."""

import json
from pathlib import Path

import pytest
import transformers

from model import checkpoint
from model.tokenizer import ChatTokenizer
from scripts import convert
from sharding.errors import UserError
from stages import pairs
from stages.evaluate import kl
from stages.files.examples import read_pairs
from stages.files.rows import Sample
from stages.files.run import run_main
from tests import tiny
from tests.model.test_hf import write_model
from tests.stages.chain import refused, run_dpo, run_rank, run_sample
from tests.stages.conftest import REWARD

# (EOS ids, how many different ones are drawn at least). The template's turns end with 2.
SHAPES = {"llama 3": ([0, 277, 2], 2), "hundreds": ([*range(619, 319, -1), 2], 20)}
VOCABULARY = 640  # the embedding is padded: from 320 on, ids have no text


def run_kl(folder: Path, out: str = "kl.json", samples: str = "samples.jsonl") -> int:
    argv = ["--checkpoint", folder / "model", "--samples", folder / samples, "--out", folder / out]
    return run_main(kl.main, kl.Kl, [str(word) for word in argv])


def run_convert(*argv) -> int:
    return run_main(convert.main, convert.Command, [str(word) for word in argv])


@pytest.fixture(scope="module", params=SHAPES)
def run(request, tmp_path_factory):
    """(a folder with a model and all stages' files, its EOS ids, how many are drawn)."""
    folder = tmp_path_factory.mktemp("ends")
    eos, many = SHAPES[request.param]
    tiny.write_checkpoint(
        folder / "model", eos_token_ids=(2,), initializer_range=0.1, vocab_size=VOCABULARY
    )
    (folder / "model/generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    prompts = [{"prompt": f"{row['prompt']} {i}"} for i in range(4) for row in tiny.PROMPTS]
    tiny.write_jsonl(folder / "prompts.jsonl", prompts)
    (folder / "reward.py").write_text(REWARD)
    assert run_sample(folder, "--max-new-tokens", "60", "--slots", "28") == 0
    assert run_rank(folder) == 0
    argv = ["--ranked", str(folder / "ranked.jsonl"), "--out", str(folder / "pairs.jsonl")]
    assert run_main(pairs.main, pairs.Args, argv) == 0
    return folder, eos, many


def test_the_end_that_was_drawn_is_kept_from_the_sampler_to_the_trainer(run):
    folder, eos, many = run
    rows = tiny.read_jsonl(folder / "samples.jsonl")
    answers = [answer for row in rows for answer in row["responses"]]
    drawn = {a["end_token_id"] for a in answers if a["finish_reason"] == "stop"}
    assert len(drawn) >= many and drawn <= set(eos)
    assert not any(set(a["token_ids"]) & set(eos) for a in answers)
    config, tokenizer = checkpoint.open_folder(str(folder / "model"))
    assert config.eos_token_ids == tuple(eos) and tokenizer.end_id == 2
    path = str(folder / "pairs.jsonl")
    examples, _ = read_pairs(path, tokenizer, VOCABULARY, 256, 128, [])
    for row, example in zip(tiny.read_jsonl(folder / "pairs.jsonl"), examples, strict=True):
        for side in ("chosen", "rejected"):
            end = row.get(f"{side}_end_token_id")
            ids = row[f"{side}_token_ids"] + ([] if end is None else [end])
            assert getattr(example, side).tolist() == ids


def test_a_model_is_at_no_distance_from_itself(run):
    folder, *_ = run
    assert run_kl(folder) == 0
    result = json.loads((folder / "kl.json").read_text())
    assert result["kl_per_answer"] == pytest.approx(0, abs=1e-4)
    assert result["kl_per_token"] == pytest.approx(0, abs=1e-5)


def test_the_trainer_s_log_probs_of_samples_are_the_sampler_s(run):
    folder, *_ = run
    assert run_dpo(folder, folder / "trained", "--batch-size", "16", "--epochs", "1") == 0
    origin = checkpoint.read_manifest(str(folder / "trained"))["origin"]
    assert origin["results"]["sampler_disagreement"] < 1e-4
    assert checkpoint.load_config(str(folder / "trained")).eos_token_ids == tuple(run[1])


def test_pairs_of_texts_end_as_the_template_ends_a_turn(run, tmp_path):
    folder, *_ = run
    own = ("token_ids", "end_token_id", "logprob", "finish_reason")
    names = {f"{side}_{name}" for side in ("chosen", "rejected") for name in own}
    rows = [
        {name: value for name, value in row.items() if name not in names | {"prompt_token_ids"}}
        for row in tiny.read_jsonl(folder / "pairs.jsonl")
    ]
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    _, tokenizer = checkpoint.open_folder(str(folder / "model"))
    examples, _ = read_pairs(path, tokenizer, VOCABULARY, 1024, 512, [])
    assert {ids[-1] for e in examples for ids in (e.chosen, e.rejected)} == {2}


# ---------------------------------------------------------------------- where EOS ids come from


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [0, 5, 2]}, {"eos_token_id": 7}, [0, 5, 2]),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 8]}, [5]),
        ({"eos_token_id": [5, 5, 2]}, {}, [5, 2]),
        ({"eos_token_id": None}, {"eos_token_id": [7, 8]}, [7, 8]),
        ({"bos_token_id": 1}, {"eos_token_id": 7}, [7]),
        (None, {"eos_token_id": [7, 2]}, [7, 2]),
        (None, {"eos_token_id": 0}, [0]),
        (None, {"eos_token_id": None}, [2]),  # the tokenizer's
        (None, {"eos_token_id": ...}, [2]),  # the default of transformers' classes
        ({"bos_token_id": 1}, {"eos_token_id": None}, [2]),
        ({"eos_token_id": []}, {"eos_token_id": []}, [2]),
        ({"eos_token_id": list(range(3, 60))}, {}, list(range(3, 60))),
        (
            {"eos_token_id": [2, 61]},
            {},
            "eos_token_id 61: it must be an id of the vocabulary of 61",
        ),
        ({"eos_token_id": -1}, {}, "eos_token_id -1: it must be"),
        ({"eos_token_id": [2, True]}, {}, "eos_token_id True: it must be"),
        ({"eos_token_id": 2.0}, {}, "eos_token_id 2.0: it must be"),
        ({"eos_token_id": "</s>"}, {}, "eos_token_id '</s>': it must be"),
        ({"eos_token_id": [[2]]}, {}, "eos_token_id [2]: it must be"),
        (None, {"bos_token_id": 61}, "bos_token_id 61: it must be an id of the vocabulary of 61"),
    ],
)
def test_eos_ids_are_those_of_transformers_there_and_back(
    tmp_path, source, capsys, generation, config, expected
):
    folder = tmp_path / "source"
    folder.mkdir()
    for file in Path(source).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    content = json.loads((folder / "config.json").read_text())
    content = {k: v for k, v in (content | config).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(content))
    code = run_convert("from-hf", folder, tmp_path / "C")
    if isinstance(expected, str):
        refused(capsys, code, expected)
        assert not (tmp_path / "C").exists()
        return
    assert code == 0
    assert checkpoint.open_folder(str(tmp_path / "C"))[0].eos_token_ids == tuple(expected)
    assert run_convert("to-hf", tmp_path / "C", tmp_path / "D") == 0
    written = json.loads((tmp_path / "D/config.json").read_text())["eos_token_id"]
    assert written == (expected if len(expected) > 1 else expected[0])
    if generation is None or generation.get("eos_token_id"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "D")
        ids = theirs.generation_config.eos_token_id
        assert ids == expected or [ids] == expected or list(dict.fromkeys(ids)) == expected


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("hf") / "source"
    return write_model(folder, num_hidden_layers=1, vocab_size=61)


# ---------------------------------------------------------------------- ids beyond the vocabulary


def test_every_command_refuses_a_checkpoint_whose_tokens_its_vocabulary_lacks(
    tmp_path, source, capsys
):
    """Refused before any work, by the name of the token and the folder."""
    tiny.write_tokenizer(tmp_path / "tokens")
    size = len(ChatTokenizer.from_folder(str(tmp_path / "tokens"), ()))
    tiny.write_checkpoint(tmp_path / "model", vocab_size=size - 1, num_hidden_layers=1)
    tiny.write_jsonl(tmp_path / "prompts.jsonl", tiny.PROMPTS)
    named = f"{tmp_path / 'model'}: token ", f"has the id {size - 1}"
    before = {path.name for path in tmp_path.iterdir()}
    refused(capsys, run_sample(tmp_path), *named)
    (tmp_path / "samples.jsonl").write_text("")
    (tmp_path / "pairs.jsonl").write_text("")
    refused(capsys, run_dpo(tmp_path, tmp_path / "trained"), *named)
    refused(capsys, run_kl(tmp_path), *named)
    refused(capsys, run_convert("to-hf", tmp_path / "model", tmp_path / "hf"), *named)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(source)
    tokenizer.add_tokens(["word61"])
    tokenizer.save_pretrained(source)
    line = f"{source}: token 'word61' has the id 61, but the model's vocabulary ends at 60"
    refused(capsys, run_convert("from-hf", source, tmp_path / "C"), line)
    after = {path.name for path in tmp_path.iterdir()}
    assert after - before == {"samples.jsonl", "pairs.jsonl"}


@pytest.mark.parametrize("bad", [-1, 320, 2**31, 2**70, True, 1.0, "7", None, [7]], ids=repr)
def test_a_row_s_own_ids_that_are_none_of_the_model_s_are_refused_by_field(base, tmp_path, bad):
    config, tokenizer = checkpoint.open_folder(str(base / "model"))
    rows = tiny.read_jsonl(base / "pairs.jsonl")
    for name in (
        "prompt_token_ids",
        "chosen_token_ids",
        "rejected_token_ids",
        "chosen_end_token_id",
    ):
        if name.endswith("end_token_id") and bad is None:
            continue  # null is no end
        value = bad if name.endswith("end_token_id") else [*rows[1][name], bad]
        changed = [rows[0], rows[1] | {name: value}, *rows[2:]]
        path = tiny.write_jsonl(tmp_path / "pairs.jsonl", changed)
        with pytest.raises(UserError, match=f"line 2.*{name}"):
            read_pairs(path, tokenizer, config.vocab_size, 1024, 512, [])
    row = tiny.read_jsonl(base / "samples.jsonl")[0]
    for name in ("prompt_token_ids", "token_ids", "end_token_id"):
        if name == "end_token_id" and bad is None:
            continue
        change = {name: bad if name == "end_token_id" else [bad]}
        response = row["responses"][0] | ({} if name.startswith("prompt") else change)
        changed = row | change | {"responses": [response]}
        with pytest.raises(UserError, match=f"line 1.*{name}"):
            kl._tokens_of(Sample(changed, "s.jsonl, line 1"), tokenizer, config)


def test_ids_beyond_the_vocabulary_end_a_stage_with_one_line(base, tmp_path, capsys):
    rows = tiny.read_jsonl(base / "pairs.jsonl")
    rows[2]["chosen_token_ids"] = [320]
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    code = run_dpo(base, tmp_path / "out", pairs=path)
    refused(capsys, code, f"{path}, line 3: field 'chosen_token_ids' holds 320")
    rows = tiny.read_jsonl(base / "samples.jsonl")
    rows[1]["prompt_token_ids"] = [True]
    tiny.write_jsonl(tmp_path / "samples.jsonl", rows)
    (tmp_path / "model").symlink_to(base / "model")
    line = "samples.jsonl, line 2: field 'prompt_token_ids' holds True"
    refused(capsys, run_kl(tmp_path), line)
    assert not (tmp_path / "out").exists() and not (tmp_path / "kl.json").exists()
