"""OUT.work, the folder of a training in the making, where a kill or a full disk left it."""

import shutil

import pytest

from model import disk
from stages.files import work
from stages.files.output import Manifest
from stages.files.work import Work, open_work
from tests import tiny

MANIFEST = Manifest("dpo", {"beta": 0.1}, {}, {})


def test_a_training_goes_on_where_its_manifest_was_cut_off(tmp_path, monkeypatch):
    out = str(tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(disk.os, "fsync", full)
        Work(out, 4, 1).begin(MANIFEST, [])
    assert [path.name for path in (tmp_path / "out.work").iterdir()] == [
        f"manifest.json{disk.MARK}"
    ]
    with open_work(out, MANIFEST, 4, 1, []) as begun:
        assert begun.states() == []
    assert (tmp_path / "out.work" / "manifest.json").exists()


def test_what_a_finished_training_leaves_goes_whoever_was_killed_at_it(tmp_path, monkeypatch):
    out, folder = str(tmp_path / "out"), tmp_path / "out.work"
    MANIFEST.write(str(folder / "manifest.json"))
    for step in (2, 4):
        tiny.write_jsonl((folder / f"state-{step}").mkdir() or folder / f"state-{step}/x", [])
    (folder / "pairs.npy").write_bytes(b"x")
    whole, gone = shutil.rmtree, []

    def killed(path, *args, **kwargs):
        if gone:
            raise KeyboardInterrupt
        gone.append(path)
        whole(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        work._remove(out)
    assert (folder / "manifest.json").exists()
    work._remove(out)
    assert not folder.exists()
