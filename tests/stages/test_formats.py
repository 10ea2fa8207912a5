"""Parquet in the published dataset's form: written, read by `datasets`, and read back."""

import dataclasses
import datetime
import json
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts import convert
from sharding.errors import UserError
from stages import pairs
from stages.files import formats, rows
from stages.files.output import read_manifest
from stages.files.paths import file_sha256, text_sha256
from stages.files.run import Stopped, run_main

PUBLISHED = {
    "prompt_id": datasets.Value("string"),
    "prompt": datasets.Value("string"),
    "chosen": [{"content": datasets.Value("string"), "role": datasets.Value("string")}],
    "rejected": [{"content": datasets.Value("string"), "role": datasets.Value("string")}],
    "all_generated_responses": datasets.List(datasets.Value("string")),
    "all_rm_scores": datasets.List(datasets.Value("float64")),
}
SYSTEM = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "last"},
]


def ranked(path: Path, n: int) -> Path:
    rows = [
        {
            "prompt": f"prompt {i}",
            "scores": [i, -1.5, 0.1],
            "topic": i,
            "responses": [{"text": f"{i} {t}", "token_ids": [i]} for t in ("a 😀", "b\u2028", "c")],
        }
        for i in range(1, n)
    ]
    rows.append({"messages": SYSTEM, "scores": [2, 1], "responses": [{"text": t} for t in "xy"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line]


def make(tmp_path: Path, iteration: int, n: int = 30) -> Path:
    out = tmp_path / f"pairs_{iteration}.jsonl"
    source = ranked(tmp_path / f"ranked_{iteration}.jsonl", n)
    pairs.main(pairs.Args(str(source), str(out), test_count=5))
    for kind, file in (("train", out), ("test", out.with_suffix(".test.jsonl"))):
        split = f"{kind}_iteration_{iteration}"
        convert.main(convert.ToParquet(str(file), str(tmp_path / "hub"), split))
    return out


def write(path: Path, rows: list[dict], schema: pa.Schema | None = None) -> str:
    """A dataset folder with this as its only split, train."""
    (path / "data").mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, path / "data" / "train-00000-of-00001.parquet")
    return str(path)


def pair(prompt="q", chosen="good", rejected="bad", **extra) -> dict:
    user = {"role": "user", "content": prompt}
    return {
        "prompt": prompt,
        "chosen": [user, {"role": "assistant", "content": chosen}],
        "rejected": [user, {"role": "assistant", "content": rejected}],
    } | extra


# ---------------------------------------------------------------------- writing


def test_datasets_reads_the_published_columns_and_the_splits_from_the_names(tmp_path):
    first, second = make(tmp_path, 1, 30), make(tmp_path, 2, 40)
    for iteration, out in ((1, first), (2, second)):
        for split, path in (("train", out), ("test", out.with_suffix(".test.jsonl"))):
            loaded = datasets.load_dataset(
                str(tmp_path / "hub"),
                split=f"{split}_iteration_{iteration}",
                cache_dir=str(tmp_path / "cache"),
            )
            assert loaded.features == datasets.Features(PUBLISHED)
            expected = [{name: row[name] for name in PUBLISHED} for row in read(path)]
            assert loaded.to_list() == expected
    names = [f"{split}_iteration_{n}" for n in (1, 2) for split in ("train", "test")]
    assert sorted(datasets.get_dataset_split_names(str(tmp_path / "hub"))) == sorted(names)
    facts = formats.split_facts(str(tmp_path / "hub"))  # the order that the card gives them
    assert [split["name"] for split in facts] == names
    assert [split["rows"] for split in facts] == [25, 5, 35, 5]
    assert facts[0]["data"][0]["stage"] == "pairs" and facts[0]["path"].startswith("data/train")


def test_written_files_are_whole_and_belong_to_their_pairs(tmp_path, capsys):
    out = make(tmp_path, 1)
    folder = tmp_path / "hub"
    path = Path(formats.write_split(str(out), str(folder), "train_iteration_1"))
    assert "finished already" in capsys.readouterr().out
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "test_iteration_1-00000-of-00001.parquet",
        "train_iteration_1-00000-of-00001.parquet",
    ]
    with out.open("a") as file:
        file.write(out.read_text().split("\n")[0] + "\n")
    with pytest.raises(UserError, match="exists from other pairs"):
        formats.write_split(str(out), str(folder), "train_iteration_1")
    formats.write_split(str(out), str(folder), "train_iteration_1", overwrite=True)
    assert pq.read_metadata(path).num_rows == 26


def test_large_files_are_written_in_groups_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "ROWS_AT_ONCE", 7)
    out = make(tmp_path, 1, 30)
    file = pq.ParquetFile(tmp_path / "hub" / "data" / "train_iteration_1-00000-of-00001.parquet")
    assert file.num_row_groups == 4
    assert [r["prompt_id"] for r in file.read().to_pylist()] == [r["prompt_id"] for r in read(out)]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    source = tmp_path / "pairs.jsonl"
    row = pair(
        "half \ud83d", prompt_id="i", all_generated_responses=["\ud83d"], all_rm_scores=[1.0]
    )
    source.write_text(json.dumps(row) + "\n")
    path = formats.write_split(str(source), str(tmp_path), "train")
    (stored,) = pq.read_table(path).to_pylist()
    assert stored["prompt"] == "half \ufffd" and stored["all_generated_responses"] == ["\ufffd"]


def test_pairs_without_the_published_columns_are_refused(tmp_path):
    source = tmp_path / "pairs.jsonl"
    source.write_text(json.dumps(pair(prompt_id="i")) + "\n")
    with pytest.raises(UserError, match="line 1: field 'all_generated_responses' is missing"):
        formats.write_split(str(source), str(tmp_path), "train")
    assert not list(tmp_path.rglob("*.parquet"))


# ---------------------------------------------------------------------- reading


def test_pairs_come_back_as_they_were(tmp_path):
    out = make(tmp_path, 1)
    back = tmp_path / "back.jsonl"
    formats.read_dataset(str(tmp_path / "hub"), str(back), "train_iteration_1")
    test = tmp_path / "test.jsonl"
    formats.read_dataset(str(tmp_path / "hub"), str(test), "test_iteration_1")
    known = {*PUBLISHED, "messages", "chosen_index", "rejected_index"}
    for original, copy in ((out, back), (out.with_suffix(".test.jsonl"), test)):
        expected = [{k: v for k, v in row.items() if k in known} for row in read(original)]
        for row in expected:  # the dataset has one string for a prompt, the turns are in chosen
            assert ("messages" in row) == (len(row["chosen"]) > 2)
        assert read(copy) == expected
    manifest = read_manifest(str(back))
    (entry,) = manifest.inputs.values()
    path, digest = entry["path"], entry["sha256"]
    assert path.endswith("train_iteration_1-00000-of-00001.parquet")
    assert digest == file_sha256(path)
    assert manifest.counts == {"in": 25, "out": 25}


def test_other_columns_are_carried(tmp_path):
    rows = [pair(score_chosen=7.5, messages=[{"role": "user", "content": "q"}], tags=["a", None])]
    formats.read_dataset(write(tmp_path / "d", rows), str(tmp_path / "o.jsonl"))
    (row,) = read(tmp_path / "o.jsonl")
    assert row["score_chosen"] == 7.5 and row["tags"] == ["a", None]
    assert row["source_messages"] == rows[0]["messages"] and "messages" not in row
    assert row["prompt_id"] == text_sha256("q")


def test_answers_alone_get_their_prompt(tmp_path):
    row = {k: v[1:] if isinstance(v, list) else v for k, v in pair().items()}
    formats.read_dataset(write(tmp_path / "d", [row]), str(tmp_path / "o.jsonl"))
    (read_back,) = read(tmp_path / "o.jsonl")
    assert read_back == {"prompt_id": text_sha256("q")} | pair()


def test_unusable_rows_are_set_aside_and_repeated_ones_merged(tmp_path):
    other = pair()
    other["rejected"] = [{"role": "user", "content": "another"}, other["rejected"][1]]
    blank = pair()
    blank["chosen"] = [{"role": "user", "content": " "}, blank["chosen"][1]]
    blank["rejected"] = [{"role": "user", "content": " "}, blank["rejected"][1]]
    rows = [
        pair(prompt_id="1"),
        pair(prompt_id="1"),
        pair(prompt_id="1", chosen="better"),
        pair(prompt_id="1", chosen="better"),
        pair(prompt_id="2", chosen="same", rejected="same"),
        pair(prompt_id="3", rejected=" "),
        other | {"prompt_id": "4"},
        blank | {"prompt_id": "5"},
    ]
    formats.read_dataset(write(tmp_path / "d", rows), str(tmp_path / "o.jsonl"))
    assert [row["prompt_id"] for row in read(tmp_path / "o.jsonl")] == ["1", "1#2"]
    assert read_manifest(str(tmp_path / "o.jsonl")).counts == {
        "in": 8,
        "out": 2,
        "merged: the same row again": 2,
        "set aside: chosen and rejected are the same text": 1,
        "set aside: an answer is empty": 1,
        "set aside: chosen and rejected answer different conversations": 1,
        "set aside: there is no user turn to answer": 1,
    }


def test_prompts_alone(tmp_path):
    rows = [pair("a", prompt_id="x"), pair("b", prompt_id="y"), pair("a", prompt_id="x")]
    rows.append(pair("  ", prompt_id="z"))
    folder = write(tmp_path / "d", rows)
    formats.read_prompts_dataset(folder, str(tmp_path / "p.jsonl"))
    assert read(tmp_path / "p.jsonl") == [
        {"prompt_id": "x", "prompt": "a"},
        {"prompt_id": "y", "prompt": "b"},
    ]
    counts = read_manifest(str(tmp_path / "p.jsonl")).counts
    assert counts["merged: the same prompt again"] == 1
    assert counts["set aside: the prompt is empty"] == 1
    write(tmp_path / "d", [{"prompt": "a"}])
    with pytest.raises(UserError, match="exists from other arguments"):
        formats.read_prompts_dataset(folder, str(tmp_path / "p.jsonl"))
    formats.read_prompts_dataset(folder, str(tmp_path / "other.jsonl"))
    assert read(tmp_path / "other.jsonl")[0]["prompt_id"] == text_sha256("a")


def test_a_stopped_reading_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    make(tmp_path, 1)
    arguments = (str(tmp_path / "hub"), str(tmp_path / "o.jsonl"), "train_iteration_1")
    original, calls = formats._pair, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 12:
            raise Stopped("stopped")
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(formats, "_pair", stopping)
        formats.read_dataset(*arguments)
    formats.read_dataset(*arguments)
    formats.read_dataset(arguments[0], str(tmp_path / "whole.jsonl"), arguments[2])
    assert (tmp_path / "o.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ---------------------------------------------------------------------- types at the border


def csv(folder: Path, **files: str) -> str:
    """A dataset folder of CSV files."""
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text)
    return str(folder)


def test_ids_become_texts_and_shards_need_not_have_the_same_columns(tmp_path):
    shards = [
        [pair("a", prompt_id=7), pair("b", prompt_id=None)],
        [pair("c", prompt_id="x", extra=[1.5]), pair("d", prompt_id="", extra=[])],
        [pair("e", prompt_id=2.0, extra="text")],
    ]
    (tmp_path / "d" / "data").mkdir(parents=True)
    for i, shard in enumerate(shards):
        file = tmp_path / "d" / "data" / f"train-{i:05}-of-00003.parquet"
        pq.write_table(pa.Table.from_pylist(shard), file)
    wanted = ["7", text_sha256("b"), "x", text_sha256("d"), "2"]
    formats.read_prompts_dataset(str(tmp_path / "d"), str(tmp_path / "p.jsonl"))
    assert [row["prompt_id"] for row in read(tmp_path / "p.jsonl")] == wanted
    formats.read_dataset(str(tmp_path / "d"), str(tmp_path / "o.jsonl"))
    assert [row["prompt_id"] for row in read(tmp_path / "o.jsonl")] == wanted
    extras = [row.get("extra") for row in read(tmp_path / "o.jsonl")]
    assert extras == [None, None, [1.5], [], "text"]
    assert len(rows.read(str(tmp_path / "o.jsonl"), rows.Pair)) == 5  # as the next stage reads it


@pytest.mark.parametrize("reader", [formats.read_dataset, formats.read_prompts_dataset])
def test_a_shard_without_rows_is_none(tmp_path, reader):
    (tmp_path / "d" / "data").mkdir(parents=True)
    table = pa.Table.from_pylist([pair("a"), pair("b")])
    for i, shard in enumerate((table.slice(0, 0), table.slice(0, 1), table.slice(0, 0))):
        pq.write_table(shard, tmp_path / "d" / "data" / f"train-{i:05}-of-00003.parquet")
    reader(str(tmp_path / "d"), str(tmp_path / "o.jsonl"))
    assert [row["prompt"] for row in read(tmp_path / "o.jsonl")] == ["a"]


def test_columns_nobody_needs_hold_what_they_like(tmp_path):
    day = datetime.datetime(2024, 5, 1, 12, 30)
    source = [
        pair("a", score=float("nan"), made=day, day=day.date(), raw=b"\xff", n=Decimal("1.5")),
        pair("b", score=2.5, made=None, day=None, raw=None, n=None),
    ]
    folder = write(tmp_path / "d", source)
    formats.read_dataset(folder, str(tmp_path / "o.jsonl"))
    first, second = read(tmp_path / "o.jsonl")
    assert first | {"score": None, "raw": None} == first
    assert (first["made"], first["day"], first["n"]) == ("2024-05-01T12:30:00", "2024-05-01", "1.5")
    assert second["score"] == 2.5
    counts = read_manifest(str(tmp_path / "o.jsonl")).counts
    assert counts["null for NaN or infinity in column score"] == 1
    assert counts["null for bytes in column raw"] == 1
    formats.read_prompts_dataset(folder, str(tmp_path / "p.jsonl"))
    assert [row["prompt"] for row in read(tmp_path / "p.jsonl")] == ["a", "b"]


def test_configs_are_named_and_taken_from_the_split(tmp_path, capsys):
    folder = csv(tmp_path / "d", a="prompt\nof one\n", b="prompt\nof two\n")
    (tmp_path / "d" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: a.csv\n- config_name: two\n"
        "  data_files: b.csv\n---\n"
    )
    out, reader = tmp_path / "out.jsonl", formats.read_prompts_dataset
    line = refused(capsys, folder, out, reader=reader)
    assert "several configs: give --split CONFIG/SPLIT with one of the configs one, two" in line
    assert "has no config 'three'" in refused(capsys, folder, out, "three/train", reader)
    assert "give one of two/train" in refused(capsys, folder, out, "two/test", reader)
    formats.read_prompts_dataset(folder, str(out), "two/train")
    assert [row["prompt"] for row in read(out)] == ["of two"]
    assert read_manifest(str(out)).arguments["split"] == "two/train"


def test_broken_files_and_odd_paths_get_one_line(tmp_path, capsys):
    out, reader = tmp_path / "out.jsonl", formats.read_prompts_dataset
    folder = csv(tmp_path / "csv", train='prompt,n\nhi,1\n"never closed,2\n')
    assert "split train: train.csv cannot be read" in refused(capsys, folder, out, reader=reader)
    folder = csv(tmp_path / "two", train="prompt\na\n", test="prompt\nb\n")
    assert "several splits: give one of test, train" in refused(capsys, folder, out, reader=reader)
    folder = csv(tmp_path / "numbers", train="prompt\n12\n")
    assert "row 1: field 'prompt' is int, not str" in refused(capsys, folder, out, reader=reader)
    folder = csv(tmp_path / "a[1]", train="prompt\na\n")
    assert "reads [ ] * ? in a path as a pattern" in refused(capsys, folder, out, reader=reader)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    line = refused(capsys, tmp_path / "json", out, reader=reader)
    assert "train.jsonl cannot be read" in line


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (-1, None, "--first is -1"),
        (2, 2, "--last is 2"),
        (0, -3, "--last is -3"),
        (9, None, "no row 9"),
    ],
)
def test_a_slice_that_is_none_is_refused(tmp_path, first, last, message):
    folder = write(tmp_path / "d", [pair(f"q{i}") for i in range(3)])
    with pytest.raises(UserError, match=message):
        formats.read_prompts_dataset(folder, str(tmp_path / "p.jsonl"), first=first, last=last)
    assert not (tmp_path / "p.jsonl").exists()


def test_rows_that_parquet_cannot_hold_are_named(tmp_path):
    good = pair(prompt_id="i", all_generated_responses=["a"], all_rm_scores=[1.0])
    for bad, message in (
        ({"all_rm_scores": ["high"]}, "line 2: all_rm_scores must hold finite numbers"),
        ({"prompt_id": 5}, "line 2: field 'prompt_id' is int"),
        ({"all_generated_responses": [{"text": "a"}]}, "line 1, or one of the 1 rows below"),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in (good, good | bad))
        (tmp_path / "pairs.jsonl").write_text(lines)
        with pytest.raises(UserError, match=message):
            formats.write_split(str(tmp_path / "pairs.jsonl"), str(tmp_path), "train")
        assert not list(tmp_path.rglob("train*.parquet"))


# ---------------------------------------------------------------------- the caller's mistakes


@dataclasses.dataclass
class Convert:
    source: str
    out: str
    split: str | None = None


def refused(capsys, source, out, split=None, reader=formats.read_dataset) -> str:
    def convert(args: Convert):
        reader(args.source, args.out, args.split)

    argv = ["--source", str(source), "--out", str(out)]
    argv += ["--split", split] if split else []
    assert run_main(convert, Convert, argv) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert not Path(out).exists()
    return stderr


@pytest.mark.parametrize("reader", [formats.read_dataset, formats.read_prompts_dataset])
def test_missing_folders_splits_and_columns_are_named(tmp_path, capsys, reader):
    out = tmp_path / "out.jsonl"
    make(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "data").mkdir(parents=True)
    (tmp_path / "broken" / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    there = "test_iteration_1, train_iteration_1"
    for source, split, message in [
        (tmp_path / "absent", None, "absent is no folder"),
        (tmp_path / "pairs_1.jsonl", None, "is no folder"),
        ("nobody/nothing", None, "neither a folder with a dataset nor one on the hub"),
        (tmp_path / "empty", None, "neither a folder with a dataset"),
        (tmp_path / "hub", None, f"has several splits: give one of {there}"),
        (tmp_path / "hub", "train", f"has no split 'train': give one of {there}"),
        (write(tmp_path / "columns", [{"text": "x", "n": 1}]), None, "no column prompt"),
        (tmp_path / "broken", None, "split train: "),
    ]:
        assert message in refused(capsys, source, out, split, reader)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "'chosen' is str, not list"),
        ({"prompt": "q", "chosen": ["good"], "rejected": ["bad"]}, "no list of {role, content}"),
        (pair() | {"chosen": pair()["chosen"][:1]}, "does not end with the assistant's answer"),
        (pair() | {"rejected": []}, "rejected does not end with"),
        (pair() | {"prompt": None}, "'prompt' is NoneType, not str"),
        (
            pair() | {"chosen": [*pair()["chosen"][:1], {"role": "tool", "content": "x"}]},
            "does not end",
        ),
        (pair(all_rm_scores=[1.0, float("nan")]), "column all_rm_scores holds NaN or infinity"),
        (pair(prompt_id=True), "prompt_id is a bool"),
    ],
)
def test_unreadable_rows_are_named(tmp_path, capsys, row, message):
    rows = [row, *([pair()] if row["prompt"] is None else [])]
    assert message in refused(capsys, write(tmp_path / "d", rows), tmp_path / "out.jsonl")


@pytest.mark.parametrize("reader", [formats.read_dataset, formats.read_prompts_dataset])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "A text.") for name in ("input", "context", "passage", "system_prompt")),
        *((name, ["A text."]) for name in ("documents", "history", "images")),
        *((name, [{"name": "search"}]) for name in ("tools", "functions")),
        ("image", {"bytes": b"\xff"}),
    ],
)
def test_a_column_of_the_task_that_is_not_asked_is_named(tmp_path, capsys, reader, name, value):
    rows = [pair("first", **{name: None}), pair(**{name: value})]
    message = refused(capsys, write(tmp_path / "d", rows), tmp_path / "o.jsonl", reader=reader)
    assert f"row 2: field '{name}' is part of the task" in message


def test_a_system_column_that_the_conversation_holds_is_carried(tmp_path):
    row = pair("last", system="s")
    for side in ("chosen", "rejected"):
        row[side] = [*SYSTEM, row[side][-1]]
    formats.read_dataset(write(tmp_path / "d", [row]), str(tmp_path / "o.jsonl"))
    assert [row["system"] for row in read(tmp_path / "o.jsonl")] == ["s"]


def test_one_id_with_two_prompts_is_named(tmp_path, capsys):
    folder = write(tmp_path / "d", [{"prompt": p, "prompt_id": "i"} for p in "ab"])
    out = tmp_path / "out.jsonl"
    message = refused(capsys, folder, out, reader=formats.read_prompts_dataset)
    assert "row 2: prompt_id 'i' stood above with another prompt" in message


def test_the_command_line_reads_pairs_and_slices_of_prompts(tmp_path):
    folder = write(tmp_path / "d", [pair(prompt=f"q{i}", prompt_id=f"i{i}") for i in range(6)])
    prompts, pairs = str(tmp_path / "p.jsonl"), str(tmp_path / "pairs.jsonl")
    argv = ["prompts", folder, prompts, "--first", "2", "--last", "5"]
    assert run_main(convert.main, convert.Command, argv) == 0
    assert [row["prompt"] for row in read(prompts)] == ["q2", "q3", "q4"]
    assert run_main(convert.main, convert.Command, ["from-parquet", folder, pairs]) == 0
    assert [row["prompt_id"] for row in read(pairs)] == [f"i{i}" for i in range(6)]
    assert run_main(convert.main, convert.Command, ["from-parquet", folder, prompts]) == 2


def test_a_row_of_prompts_that_stands_twice_is_counted(tmp_path):
    texts = ("a", "b", "a", "c")
    mine, out = tmp_path / "mine.jsonl", tmp_path / "p.jsonl"
    mine.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    convert.main(convert.Prompts(str(mine), str(out)))
    assert [row["prompt"] for row in read(out)] == ["a", "b", "c"]
    counts = read_manifest(str(out)).counts
    assert counts == {"in": 4, "out": 3, "merged: the same prompt again": 1}


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"not parquet at all", None])
def test_a_damaged_split_beside_the_new_one_is_named(tmp_path, damage):
    pairs = make(tmp_path, 1)
    other = tmp_path / "hub/data/train_iteration_2-00000-of-00001.parquet"
    whole = (tmp_path / "hub/data/train_iteration_1-00000-of-00001.parquet").read_bytes()
    other.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    with pytest.raises(UserError, match=r"train_iteration_2.* cannot be read"):
        convert.main(convert.ToParquet(str(pairs), str(tmp_path / "hub"), "train_iteration_1"))
    with pytest.raises(UserError, match="exists from other pairs"):
        formats.write_split(str(pairs), str(tmp_path / "hub"), "train_iteration_2")
    formats.write_split(str(pairs), str(tmp_path / "hub"), "train_iteration_2", overwrite=True)
    assert len(formats.split_facts(str(tmp_path / "hub"))) == 3
