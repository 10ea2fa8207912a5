"""Which folders a checkpoint may take the place of, on a disk and in an object store."""

import pytest

from model import checkpoint, disk
from model import checkpoint_writing as writing
from sharding.errors import UserError
from tests import tiny


@pytest.fixture(params=["disk", "object store"])
def store(request, monkeypatch) -> str:
    """In an object store a folder is written in its place; a local one stands in for it."""
    monkeypatch.setattr(writing, "_in_object_store", lambda path: request.param != "disk")
    return request.param


def test_a_folder_of_the_user_s_own_is_taken(tmp_path, store):
    (tmp_path / "C").mkdir()
    (tmp_path / "C" / "notes.txt").write_text("mine")
    assert writing.is_taken(str(tmp_path / "C"))
    with pytest.raises(UserError, match="C exists: choose another folder"):
        tiny.write_checkpoint(tmp_path / "C")
    assert (tmp_path / "C" / "notes.txt").read_text() == "mine"


def test_what_a_killed_process_left_is_replaced(tmp_path, store, monkeypatch):
    folder = tmp_path / "C"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writing, "fingerprint", killed)  # the parameters are written, no more
        with pytest.raises(KeyboardInterrupt):
            tiny.write_checkpoint(folder)
    unfinished = tmp_path / f"C{disk.MARK}"
    assert unfinished.exists() == (store == "disk")
    assert not writing.is_taken(str(folder))
    identity = tiny.write_checkpoint(folder)
    assert checkpoint.identity(str(folder)) == identity
    assert not (folder / writing.UNFINISHED).exists() and not unfinished.exists()


def test_a_whole_checkpoint_is_never_replaced_whatever_its_mark(tmp_path, store):
    tiny.write_checkpoint(tmp_path / "C")
    (tmp_path / "C" / writing.UNFINISHED).touch()  # killed before the mark was removed
    assert writing.is_taken(str(tmp_path / "C"))


def test_a_link_to_nothing_is_the_user_s(tmp_path):
    (tmp_path / "C").symlink_to(tmp_path / "own")
    with pytest.raises(UserError, match="C is a link to nothing"):
        writing.is_taken(str(tmp_path / "C"))
