"""What is reported as saved survives a power cut: the order of the calls that see to that."""

import errno
import gc
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from model import checkpoint_writing, disk
from stages.files import paths
from stages.files.output import Manifest, Output
from stages.files.work import Work
from tests import tiny


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """(name, path) of each fsync and rename; the new name of a renamed file."""
    made, replace, fsync = [], os.replace, os.fsync

    def replacing(old, new):
        replace(old, new)
        made.append(("rename", os.path.abspath(new)))

    def syncing(descriptor):
        made.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(os, "fsync", syncing)
    return made


def write_rows(folder: Path) -> Path:
    output = Output.open(str(folder / "out"), Manifest("test", {}, {}, {}))
    output.write({"prompt_id": "a"})
    output.set_aside({"prompt_id": "b"}, "no reason")
    output.finish(["a", "b"], {"in": 2})
    return folder / "out"


def write_json(folder: Path) -> Path:
    output = Output.open(str(folder / "out"), Manifest("test", {}, {}, {}))
    output.finish_as([1], {})
    return folder / "out"


def write_text(folder: Path) -> Path:
    paths.write_atomically(str(folder / "out"), "text")
    return folder / "out"


def write_checkpoint(folder: Path) -> Path:
    tiny.write_checkpoint(folder / "out")
    return folder / "out"


def write_state(folder: Path) -> Path:
    shutil.rmtree(f"{folder / 'out'}{disk.MARK}", ignore_errors=True)  # as Work.begin does
    checkpoint_writing.save_state(str(folder / "out"), {"x": jnp.ones(3)})()
    return folder / "out"


@pytest.mark.parametrize(
    "write", [write_rows, write_json, write_text, write_checkpoint, write_state]
)
def test_content_goes_before_the_name_and_the_name_before_the_report(tmp_path, calls, write):
    out = write(tmp_path)
    temporary = next(path for name, path in calls[::-1] if disk.MARK in path or ".sorted" in path)
    renamed = calls.index(("rename", str(out)))
    files = [out] if out.is_file() else [out, *out.rglob("*")]
    for file in files:
        before = str(file).replace(str(out), temporary.partition(disk.MARK)[0], 1)
        names = {before, before + disk.MARK, str(file).replace(str(out), f"{out}{disk.MARK}", 1)}
        assert any(("fsync", name) in calls[:renamed] for name in names), file
    assert ("fsync", str(tmp_path)) in calls[renamed:]


def test_a_manifest_is_safe_before_the_file_that_it_tells_of(tmp_path, calls):
    write_rows(tmp_path)
    order = [
        ("rename", f"{tmp_path}/out{end}") for end in (".set_aside.jsonl", ".manifest.json", "")
    ]
    places = [calls.index(call) for call in order]
    assert places == sorted(places)
    assert all(calls[place + 1] == ("fsync", str(tmp_path)) for place in places)


def test_metrics_are_safe_before_the_state_that_makes_them_needless(tmp_path, calls):
    work = Work(str(tmp_path / "out"), total_steps=4, keep=1)
    work.begin(Manifest("dpo", {}, {}, {}), [])
    work.open_log(0)
    metrics = str(tmp_path / "out.log" / "metrics.jsonl")
    for step in (1, 2):
        work.log(step, {"loss": 1.0})
    calls.clear()
    work.save_state(2, {"x": jnp.ones(3)})
    work.finish_saving()
    state = ("rename", str(tmp_path / "out.work" / "state-2"))
    assert calls.index(("fsync", metrics)) < calls.index(state)
    calls.clear()
    work.log(4, {"loss": 1.0})  # the last step: OUT itself comes next
    assert ("fsync", metrics) in calls
    work.close_log()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    "write", [write_rows, write_json, write_text, write_checkpoint, write_state]
)
def test_a_failing_fsync_names_the_file_and_leaves_nothing_that_seems_whole(
    tmp_path, monkeypatch, write, number
):
    def failing(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError) as raised:
        write(tmp_path)
    assert raised.value.errno == number and str(tmp_path) in raised.value.filename
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    del raised
    gc.collect()  # the failed attempt's hold on its file; a process of its own ends with it
    assert write(tmp_path).exists()


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path, monkeypatch):
    def refusing(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refusing)
    assert write_text(tmp_path).read_text() == "text"
