"""scripts.convert where paths are odd, taken by others, or cannot be written."""

import json
import resource
from pathlib import Path

import pytest

from model import checkpoint
from scripts import convert
from stages.files.lock import lock
from stages.files.output import read_manifest
from stages.files.paths import file_sha256
from stages.files.run import run_main
from tests import tiny
from tests.model.test_hf import write_model


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("hf") / "source", num_hidden_layers=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("ours") / "model"
    tiny.write_checkpoint(folder, num_hidden_layers=1)
    return str(folder)


def command(*argv) -> int:
    return run_main(convert.main, convert.Command, [str(word) for word in argv])


def refused(capsys, *argv) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert command(*argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pairs_file(path: Path) -> str:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    columns = {"chosen": turns, "rejected": [turns[0], turns[1] | {"content": "b"}]}
    scores = {"all_generated_responses": ["a", "b"], "all_rm_scores": [1.0, 0.0]}
    return tiny.write_jsonl(path, [{"prompt_id": "i", "prompt": "q"} | columns | scores])


def test_slashes_at_the_end_of_paths_are_nothing(tmp_path, source, capsys):
    assert command("from-hf", f"{source}/", f"{tmp_path}/new/C/") == 0
    assert command("from-hf", source, f"{tmp_path}/new/C") == 0
    assert "C is finished already" in capsys.readouterr().out
    assert command("to-hf", f"{tmp_path}/new/C/", f"{tmp_path}/D//") == 0
    assert command("to-hf", f"{tmp_path}/new/C", f"{tmp_path}/D") == 0
    pairs = pairs_file(tmp_path / "pairs.jsonl")
    assert command("to-parquet", pairs, f"{tmp_path}/hub/", "--split", "train") == 0
    assert command("from-parquet", f"{tmp_path}/hub/", f"{tmp_path}/back.jsonl/") == 0
    assert command("prompts", f"{tmp_path}/hub", f"{tmp_path}/prompts.jsonl/") == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["D", "hub", "new"]


def test_a_place_that_is_none_is_refused_by_its_argument(tmp_path, source, model, capsys):
    for argv, message in (
        (("from-hf", source, "s3://bucket/C"), "CHECKPOINT s3://bucket/C: s3:// is not supported"),
        (("from-hf", "file:///models/m", tmp_path / "C"), "SRC file:///models/m: file:// is not"),
        (("to-hf", model, ""), "DST is empty"),
        (("to-hf", model, tmp_path / "D", "--base", "az://b/c"), "--base az://b/c: az:// is not"),
        (("from-parquet", tmp_path, "s3://b/p.jsonl"), "OUT s3://b/p.jsonl: s3:// is not"),
        (("to-hf", model, tmp_path / "D", "--results", "s3://b/c.json"), "s3://b/c.json: s3:// is"),
    ):
        assert message in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_an_input_is_refused_by_whatever_name(tmp_path, source, model, capsys):
    before = files_of(Path(source)), files_of(Path(model))
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "linked").symlink_to(model)
    assert "input" in refused(capsys, "from-hf", source, tmp_path / "link")
    assert "input" in refused(capsys, "to-hf", model, tmp_path / "linked" / ".." / "model")
    assert "input" in refused(capsys, "to-hf", model, f"{tmp_path}/linked/")
    assert (files_of(Path(source)), files_of(Path(model))) == before


def test_a_link_to_nothing_is_refused_before_the_work(tmp_path, source, model, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is a link to nothing" in refused(capsys, "from-hf", source, tmp_path / "link")
    assert "is a link to nothing" in refused(capsys, "to-hf", model, tmp_path / "link")


def test_folders_of_the_users_beside_an_output_stay(tmp_path, source, model):
    for name in ("C.tmp", "D.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    assert command("from-hf", source, tmp_path / "C") == 0
    assert command("to-hf", model, tmp_path / "D") == 0
    for name in ("C.tmp", "D.tmp"):
        assert (tmp_path / name / "thesis.txt").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"C", "D", "C.tmp", "D.tmp"}


def test_two_processes_do_not_write_one_folder(tmp_path, source, model, capsys):
    with lock(f"{tmp_path}/C"):
        for argv in (("from-hf", source), ("to-hf", model)):
            line = refused(capsys, *argv, f"{tmp_path}/C/")
            assert "C is being written by another process" in line
    assert list(tmp_path.iterdir()) == []
    assert command("from-hf", source, tmp_path / "C") == 0


@pytest.mark.parametrize("place", ["n" * 300, "file/C"])
def test_a_place_that_cannot_be_is_refused_in_one_line(tmp_path, source, model, capsys, place):
    (tmp_path / "file").write_text("")
    for argv in (("from-hf", source), ("to-hf", model)):
        assert str(tmp_path) in refused(capsys, *argv, tmp_path / place)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, source, model, capsys):
    """The limit of a file's size stands for the disk's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for argv in (("from-hf", source, tmp_path / "C"), ("to-hf", model, tmp_path / "D")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            assert str(argv[-1]) in refused(capsys, *argv)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not argv[-1].exists()
        assert command(*argv) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"C", "D"}


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_a_size_that_is_none_is_refused(tmp_path, model, capsys, size):
    line = refused(capsys, "to-hf", model, tmp_path / "D", "--max-shard-gb", size)
    assert "--max-shard-gb" in line and size in line
    assert "give a finite number" in line or "give a size of a byte or more" in line


def test_a_split_whose_name_datasets_would_refuse_is_refused(tmp_path, capsys):
    pairs = pairs_file(tmp_path / "pairs.jsonl")
    line = refused(capsys, "to-parquet", pairs, tmp_path / "hub", "--split", "../train")
    assert "--split ../train" in line and not (tmp_path / "hub").exists()


def test_the_origin_names_files_by_role_and_one_of_before_is_recognised(tmp_path, source, capsys):
    folder = tmp_path / "C"
    assert command("from-hf", source, folder) == 0
    manifest = checkpoint.read_manifest(str(folder))
    inputs = manifest["origin"]["inputs"]
    file = f"{source}/config.json"
    assert inputs["config.json"] == {"path": file, "sha256": file_sha256(file)}
    # Before, a file's name stood for its role and its path.
    manifest["origin"]["inputs"] = {name: entry["sha256"] for name, entry in inputs.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert command("from-hf", source, folder) == 0
    assert "is finished already" in capsys.readouterr().out
    assert command("to-hf", folder, tmp_path / "D") == 0
    assert "config.json, generation_config.json" in (tmp_path / "D/README.md").read_text()


def test_a_folder_that_is_no_export_is_not_written_into(tmp_path, model, capsys):
    (tmp_path / "D").mkdir()
    for text in ("[]", "no JSON"):
        (tmp_path / "D" / "manifest.json").write_text(text)
        assert "is something else" in refused(capsys, "to-hf", model, tmp_path / "D")
    assert [p.name for p in (tmp_path / "D").iterdir()] == ["manifest.json"]


def test_rows_of_a_prompts_file_keep_their_fields_and_their_lineage(tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "kind": "k"} for i in range(5)]
    source, out = tiny.write_jsonl(tmp_path / "all.jsonl", rows), tmp_path / "some.jsonl"
    assert command("prompts", source, out, "--first", "1", "--last", "3") == 0
    taken = tiny.read_jsonl(out)
    assert [{k: row[k] for k in ("prompt", "kind")} for row in taken] == rows[1:3]
    made = read_manifest(str(out))
    assert made.inputs["prompts"] == {"path": source, "sha256": file_sha256(source)}
    assert made.arguments == {"first": 1, "last": 3} and made.counts == {"in": 2, "out": 2}
    assert command("prompts", source, out, "--first", "1", "--last", "3") == 0
    assert "is finished already" in capsys.readouterr().out
    assert "leave none of its 5" in refused(capsys, "prompts", source, out, "--first", "5")
    assert "leave none of its 5" in refused(capsys, "prompts", source, out, "--first", "-1")
    assert "leave none of its 5" in refused(capsys, "prompts", source, out, "--last", "-1")
    assert "--split is for a data set" in refused(capsys, "prompts", source, out, "--split", "a")
