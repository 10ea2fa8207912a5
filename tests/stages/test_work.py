"""OUT.work, the folder of a training in the making, where a kill or a full disk left it."""

import shutil
import subprocess
import sys

import pytest

from model import disk
from stages.files import paths, work
from stages.files.output import Manifest
from stages.files.work import Work, open_work
from tests import tiny

MANIFEST = Manifest("dpo", {"beta": 0.1}, {}, {})


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_training_goes_on_where_its_manifest_was_cut_off(tmp_path, monkeypatch, where, error):
    out = str(tmp_path / "out")

    def cut_off(*_):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        place = (paths, "publish") if where == "write" else (disk.os, where)
        patch.setattr(*place, cut_off)
        Work(out, 4, 1).begin(MANIFEST, [])
    assert [path.name for path in (tmp_path / "out.work").iterdir()] == [
        f"manifest.json{disk.MARK}"
    ]
    with open_work(out, MANIFEST, 4, 1, []) as begun:
        assert begun.states() == []
    assert (tmp_path / "out.work" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("aside", "call", "file"),
    [
        ([{"file": "x" * 20_000}], "", "out.log/set_aside.jsonl"),
        ([], "work.log(1, {str(n): 0.5 for n in range(2000)})", "out.log/metrics.jsonl"),
        ([], "work._event(1, file_version='x' * 20_000)", "out.log/tensorboard"),
    ],
)
def test_a_full_disk_names_the_file_of_the_log(tmp_path, aside, call, file):
    code = f"""
import resource
from stages.files.output import Manifest
from stages.files.work import open_work
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    with open_work("{tmp_path}/out", Manifest("dpo", {{}}, {{}}, {{}}), 4, 1, {aside}) as work:
        {call or "pass"}
except OSError as error:
    print(error.filename, error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/{file} File too large\n", done.stderr


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
