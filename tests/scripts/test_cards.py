"""Model and dataset cards: front matter that the hub takes, what is known in the text, no more."""

import json
import re
from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard, ModelCard

from model import checkpoint
from scripts import cards, convert
from sharding.errors import UserError
from stages import pairs
from stages.files.output import Manifest, an_input, manifest_path
from stages.files.paths import file_sha256
from stages.files.provenance import provenance
from stages.files.run import run_main
from tests import tiny
from tests.model.rankers.test_lengths import ranked

LENGTHS = {
    "sampled": {"n": 9, "mean": 50},
    "chosen": {"n": 3, "mean": 61},
    "rejected": {"n": 3, "mean": 40},
    "gap": 21,
}
SOURCE = {"hub_id": "some-org/tiny", "revision": "a" * 40, "license": "apache-2.0"}


def written(
    path: Path, stage: str, inputs: list[str], content="x", identities=None, **known
) -> str:
    """A file of `stage` with its manifest."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    by_role = {
        Path(file).stem: an_input(file, None if Path(file).exists() else "?") for file in inputs
    }
    manifest = Manifest(stage, known.get("arguments", {}), by_role, identities or {"model": "m1"})
    manifest.counts = {"in": 4, "out": 3, "set aside: all scores tie": 1}
    manifest.results = known.get("results", {}) | {"sha256": file_sha256(str(path))}
    manifest.write(manifest_path(str(path)))
    return str(path)


def pairs_of(folder: Path) -> str:
    """A pairs.jsonl with all that it was made of, prompts from the hub."""
    hub = "hf://datasets/some-org/prompts@0123/data/train-00000-of-00001.parquet"
    prompts = written(folder / "prompts.jsonl", "prompts-from-parquet", [hub])
    sampled = {"n": 3, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 96}
    samples = written(folder / "samples.jsonl", "sample", [prompts], arguments=sampled)
    known = {"ranker": "org/PairRM"}
    ranked = written(folder / "ranked.jsonl", "rank", [samples], results=known)
    return written(
        folder / "pairs.jsonl",
        "pairs",
        [ranked],
        arguments={"strategy": "max-min", "length_penalty": 0.25},
        results={"lengths": {"characters": LENGTHS}},
    )


def trained(parent: dict, data: list[dict], identity: str) -> dict:
    """The manifest of a checkpoint as stages.dpo writes it."""
    arguments = {
        "loss": "sigmoid",
        "beta": 0.1,
        "optimizer": "adamw",
        "learning_rate": 5e-05,
        "schedule": "linear",
        "warmup_ratio": 0.1,
        "epochs": 1,
        "batch_size": 4,
        "max_length": 512,
        "max_prompt_length": 256,
        "dtype": "float32",
    }
    results = {"eval_rewards/accuracies": 0.625}
    counts = {"in": 3, "set aside: no token ids": 1}
    origin = Manifest("dpo", arguments, {"/home/me/pairs.jsonl": "?"}, {}, counts, results)
    return {
        "identity": identity,
        "parameters": 1234567,
        "origin": vars(origin),
        "parent": parent,
        "data": data,
    }


@pytest.fixture
def second(tmp_path) -> dict:
    """A checkpoint's manifest after two iterations."""
    start = {
        "identity": "m1",
        "parameters": 1234567,
        "source": SOURCE,
        "origin": {"stage": "convert", "inputs": {"model.safetensors": "?"}},
    }
    data = provenance(pairs_of(tmp_path))
    return trained(trained(start, data, "m2"), [], "m3")


def row_of(card: str, name: str) -> list[str]:
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


# ---------------------------------------------------------------------- the model's card


def test_the_front_matter_is_the_hubs_and_holds_what_is_known(second):
    card = ModelCard(cards.model_card(second, "bfloat16", None, []))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "some-org/tiny",
        "license": "apache-2.0",
        "datasets": ["some-org/prompts"],
        "tags": ["preference-alignment", "dpo"],
    }
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_the_text_tells_base_data_recipe_iteration_and_limits(second):
    rounding = "bfloat16 rounds away the whole update of 5 of 9 changed weights (55.6%)"
    card = cards.model_card(second, "bfloat16", rounding, [])
    assert "# some-org/tiny after 2 iterations of preference alignment" in card
    assert "1,234,567 parameters, stored as bfloat16." in card
    assert row_of(card, "its revision") == ["a" * 40]
    hub = "hf://datasets/some-org/prompts@0123/data/train-00000-of-00001.parquet"
    expected = {
        "prompts": f"{hub} (4)",
        "answers to each": "3, temperature 0.7, top-p 0.9, up to 96 tokens",
        "ranker": "org/PairRM",
        "pairs": "2, max-min",
        "length penalty": "0.25",
        "mean characters": "chosen 61, rejected 40",
        "loss": "sigmoid, β 0.1",
        "optimizer": "adamw, learning rate 5e-05, linear, warm-up 0.1",
        "epochs, pairs per step": "1, 4",
        "longest, tokens": "512, of these prompt 256",
        "test pairs ordered right": "62.5%",
    }
    for name, value in expected.items():
        assert row_of(card, name)[0] == value
    # Of the second iteration's data nothing is known, and nothing is made up.
    for name in ("prompts", "answers to each", "ranker", "length penalty", "mean characters"):
        assert row_of(card, name)[1] == "not known"
    assert "- Bfloat16 rounds away" in card and "no results were given" in card
    assert "apache-2.0, as the base model's own metadata state" in card
    assert "/home/me" not in card


def test_of_a_model_of_which_nothing_is_known_nothing_is_told():
    made = {"identity": "m1", "parameters": 5, "origin": {}}
    card = cards.model_card(made, "float32", None, [])
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert "# A language model\n" in card and "Training" not in card
    assert row_of(card, "base model") == ["not known"]
    assert "Not known: nothing that the model was made from states one." in card


def test_data_that_was_edited_or_is_gone_is_said_so(tmp_path):
    file = pairs_of(tmp_path)
    assert [e["stage"] for e in provenance(file)] == [
        "pairs",
        "rank",
        "sample",
        "prompts-from-parquet",
    ]
    (tmp_path / "samples.jsonl").write_text("another")  # no longer what was ranked
    assert [e["stage"] for e in provenance(file)] == ["pairs", "rank"]
    with open(file, "a") as opened:
        opened.write("y")
    edited = provenance(file)
    assert [e["edited"] for e in edited] == [True, False]
    assert (
        "edited by hand"
        in row_of(
            cards.model_card(
                trained({"identity": "m1", "origin": {}, "parameters": 5}, edited, "m2"),
                "float32",
                None,
                [],
            ),
            "pairs",
        )[0]
    )
    assert provenance(__file__) == []


def test_inputs_of_before_they_had_roles_are_read_as_well(tmp_path):
    file, entries = pairs_of(tmp_path), []
    for inputs_by_path in (False, True):
        entries.append(provenance(file))
        for beside in tmp_path.glob("*.manifest.json") if not inputs_by_path else ():
            manifest = json.loads(beside.read_text())
            manifest["inputs"] = {e["path"]: e["sha256"] for e in manifest["inputs"].values()}
            beside.write_text(json.dumps(manifest))
    assert [e["stage"] for e in entries[0]] == [e["stage"] for e in entries[1]]
    embedded = [e | {"inputs": {"hf://datasets/a/b@1/x.parquet": "?"}} for e in entries[1]]
    made = {"identity": "m1", "origin": {}, "parameters": 5}
    for data, prompts in ((entries[1], "train-00000"), (embedded, "hf://datasets/a/b@1/x.parquet")):
        card = cards.model_card(trained(made, data, "m2"), "float32", None, [])
        assert prompts in row_of(card, "prompts")[0]


# ---------------------------------------------------------------------- results


COMPARED = {
    "generators": ["me", "start|model"],
    "ranker": "/home/me/reward.py:reward",
    "n": 96,
    "win_rate": 0.63,
    "interval": [0.53, 0.72],
    "length_controlled_win_rate": None,
    "mean_length": [120.4, 190.0],
}
SCORED = {
    "reference": "gpt4",
    "n_total": 805,
    "win_rate": 30.22,
    "interval": [27.0, 33.5],
    "length_controlled_winrate": 31.5,
    "length_control": "v1",
    "avg_length": 2600,
}
KL = {
    "samples": "/home/me/heldout.samples.jsonl",
    "prompts": 32,
    "kl_per_token": 0.0123,
    "standard_error": None,
}


def test_results_are_tables_of_what_was_measured_of_this_model(second, tmp_path):
    ours = written(tmp_path / "ours.json", "evaluate outputs", [], "a", {"model": "m3"})
    start = written(tmp_path / "start.json", "evaluate outputs", [], "b", {"model": "m1"})
    judged = {"outputs": file_sha256(ours), "baseline": file_sha256(start)}
    compared = written(tmp_path / "c.json", "evaluate compare", [start, ours], COMPARED, judged)
    scored = written(tmp_path / "s.json", "evaluate score", ["gone.json"], SCORED, {"none": ""})
    kl = written(tmp_path / "k.json", "evaluate kl", [], KL, {"model": "m3", "sampler": "m1"})
    back = written(tmp_path / "b.json", "evaluate kl", [], KL, {"model": "m2", "sampler": "m3"})
    card = cards.model_card(second, "bfloat16", None, [scored, compared, kl, back])
    assert (
        "| the base model | reward.py:reward | 96 | 63.0% [53.0%, 72.0%] | not known | 120, 190 "
        "| yes |" in card
    )
    assert "| gpt4 | 805 | 30.2% [27.0%, 33.5%] | 31.5% (v1) | 2600 | not known |" in card
    for pair in ("the base model ‖ this model", "this model ‖ iteration 1"):
        assert f"| {pair} | heldout.samples.jsonl | 32 | 0.0123 | yes |" in card
    assert "no results were given" not in card and "/home/me" not in card
    with pytest.raises(UserError, match=r"c\.json: is of another model \(m3\) than this \(m1\)"):
        cards.model_card(second["parent"]["parent"], "float32", None, [compared])
    with pytest.raises(UserError, match=r"b\.json: is of another model"):
        cards.model_card(second["parent"]["parent"], "float32", None, [back])
    (tmp_path / "start.json").unlink()  # then its name is what the file says
    card = cards.model_card(second, "bfloat16", None, [compared])
    assert "| start\\|model | reward.py:reward | 96 |" in card


@pytest.mark.parametrize(
    ("stage", "content", "message"),
    [
        ("sample", COMPARED, "has no manifest of stages.evaluate compare, score or kl"),
        ("evaluate compare", "{}", r"damaged \(KeyError"),
        ("evaluate score", "no JSON", r"damaged \(JSONDecodeError"),
    ],
)
def test_what_is_no_result_is_refused(second, tmp_path, stage, content, message):
    file = written(tmp_path / "r.json", stage, [], content, {"model": "m3"})
    with pytest.raises(UserError, match=f"--results .*r.json: {message}"):
        cards.model_card(second, "float32", None, [file])
    with pytest.raises(UserError, match="absent does not exist"):
        cards.model_card(second, "float32", None, ["absent"])


# ---------------------------------------------------------------------- written by to-hf


def test_to_hf_writes_the_card_renews_it_and_leaves_a_users_own(tmp_path, capsys):
    tiny.write_checkpoint(tmp_path / "C")
    dst, readme = tmp_path / "D", tmp_path / "D" / "README.md"
    made = checkpoint.read_manifest(str(tmp_path / "C"))
    convert.main(convert.ToHf(str(tmp_path / "C"), str(dst), dtype="bfloat16"))
    first = readme.read_text()
    assert f"`{made['identity']}`" in first and "- Bfloat16 rounds " in first
    kl = written(
        tmp_path / "k.json",
        "evaluate kl",
        [],
        KL,
        {"model": made["identity"], "sampler": "unknown"},
    )
    again = convert.ToHf(str(tmp_path / "C"), str(dst), dtype="bfloat16", results=(kl,))
    convert.main(again)
    renewed = readme.read_text()
    assert "0.0123" in renewed and "- Bfloat16 rounds " in renewed
    # Without --results what was given before stays.
    convert.main(convert.ToHf(str(tmp_path / "C"), str(dst), dtype="bfloat16"))
    assert readme.read_text() == renewed
    readme.write_text(renewed.replace("# A language model", "# My model"))
    capsys.readouterr()
    convert.main(again)
    assert "was changed since: left as it is" in capsys.readouterr().out
    assert "# My model" in readme.read_text()
    readme.unlink()
    convert.main(again)
    assert readme.read_text() == renewed


def test_a_models_licence_is_that_of_its_own_card(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: en\n---\n# Hi\n"
    )
    source = cards.source_of_hf(str(tmp_path), "some-org/tiny", "abc")
    assert source == {
        "hub_id": "some-org/tiny",
        "revision": "abc",
        "license": "other",
        "license_name": "mine",
        "license_link": "LICENSE",
    }
    made = {"identity": "m1", "parameters": 5, "origin": {}, "source": source}
    card = cards.model_card(made, "float32", None, [])
    assert ModelCard(card).data.license_name == "mine" and "mine (LICENSE), as the base" in card
    for damaged in ("---\nlicense: [\n---\n", "no front matter", "---\nlicense: 5\n---\n"):
        (tmp_path / "README.md").write_text(damaged)
        assert cards.source_of_hf(str(tmp_path), str(tmp_path), None) == {}


# ---------------------------------------------------------------------- the dataset's card


def add(tmp_path: Path, iteration: int, n: int, *more) -> None:
    rows = [([i % 7 + 1.0, 0.5, -1.0], [40, 30, 20 + i]) for i in range(n)]
    source = ranked(tmp_path / f"ranked_{iteration}.jsonl", rows)
    out = tmp_path / f"pairs_{iteration}.jsonl"
    argv = ["--ranked", str(source), "--out", str(out), "--test-count", "5", *more]
    assert run_main(pairs.main, pairs.Args, argv) == 0
    for kind, file in (("train", out), ("test", out.with_suffix(".test.jsonl"))):
        argv = ["to-parquet", str(file), str(tmp_path / "hub")]
        argv += ["--split", f"{kind}_iteration_{iteration}", *more]
        assert run_main(convert.main, convert.Command, argv) == 0


def splits_of(folder: Path) -> dict[str, int]:
    """What `datasets` loads, with its checks of the card's numbers."""
    loaded = datasets.load_dataset(str(folder), cache_dir=str(folder.parent / "cache"))
    return {name: len(split) for name, split in loaded.items()}


def test_the_datasets_card_grows_with_the_iterations(tmp_path):
    readme = tmp_path / "hub" / "README.md"
    add(tmp_path, 1, 30)
    assert splits_of(tmp_path / "hub") == {"train_iteration_1": 25, "test_iteration_1": 5}
    add(tmp_path, 2, 20)
    names = ["train_iteration_1", "test_iteration_1", "train_iteration_2", "test_iteration_2"]
    assert splits_of(tmp_path / "hub") == dict(zip(names, (25, 5, 15, 5)))
    data = DatasetCard.load(readme).data.to_dict()
    (config,) = data["configs"]
    assert config["data_files"] == [
        {"split": name, "path": f"data/{name}-00000-of-00001.parquet"} for name in names
    ]
    info = data["dataset_info"]
    assert [(s["name"], s["num_examples"]) for s in info["splits"]] == list(
        zip(names, (25, 5, 15, 5))
    )
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "hub" / "data").iterdir()}
    assert info["download_size"] == sum(sizes.values())
    split = datasets.load_dataset(
        str(tmp_path / "hub"), split=names[0], cache_dir=str(tmp_path / "cache")
    )
    assert info["splits"][0]["num_bytes"] == pytest.approx(split.data.nbytes, rel=0.05)
    assert [f["name"] for f in info["features"]] == split.column_names
    assert "license" not in data
    text = readme.read_text()
    for name in names:
        assert f"| {name} | {info['splits'][names.index(name)]['num_examples']} | " in text
        assert f"| {sizes[f'{name}-00000-of-00001.parquet']:,} |" in text
    assert "max-min, length penalty 0.0 | chosen" in text and str(tmp_path) not in text


def test_a_split_that_is_made_again_is_counted_again(tmp_path):
    add(tmp_path, 1, 30)
    add(tmp_path, 1, 40, "--overwrite")
    assert splits_of(tmp_path / "hub") == {"train_iteration_1": 35, "test_iteration_1": 5}


def test_a_card_that_the_user_changed_keeps_its_words_and_learns_the_splits(tmp_path, capsys):
    readme = tmp_path / "hub" / "README.md"
    add(tmp_path, 1, 30)
    mine = readme.read_text().replace("# Preference pairs", "# My pairs")
    readme.write_text(mine.replace("tags:", "license: mit\ntags:", 1))
    capsys.readouterr()
    add(tmp_path, 2, 20)
    assert "README.md was changed by hand" in capsys.readouterr().out
    card = DatasetCard.load(readme)
    assert "# My pairs" in card.text and card.data.license == "mit"
    assert len(card.data["configs"][0]["data_files"]) == 4 == len(splits_of(tmp_path / "hub"))
    before = readme.read_bytes()
    add(tmp_path, 2, 20)
    assert readme.read_bytes() == before
    readme.write_text("---\nlicense: [\n---\n")
    with pytest.raises(UserError, match="its front matter cannot be read"):
        cards.write_dataset_card(str(tmp_path / "hub"))


def test_pairs_of_a_known_ranker_and_model_are_told_in_the_datasets_card(tmp_path):
    data = provenance(pairs_of(tmp_path))
    split = {"name": "train", "path": "data/x", "rows": 3, "bytes": 10, "num_bytes": 9}
    features = datasets.Features({"prompt": datasets.Value("string")})
    _, card = cards.dataset_card(
        [split | {"data": data}, split | {"name": "test", "data": None}], features
    )
    made = card[card.index("## How") :]
    assert re.search(
        r"\| train \| hf://.*parquet \(4\) \| `m1` \| 3, temperature 0.7, top-p 0.9 \| "
        r"org/PairRM \| max-min, length penalty 0.25 \| chosen 61, rejected 40 \|",
        made,
    )
    assert row_of(made, "test") == ["not known"] * 6
    assert "record none of the prompts (some-org/prompts) or of the model" in card
