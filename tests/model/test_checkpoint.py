"""Which folders a checkpoint may take the place of, on a disk and in an object store, and how many
bytes are read."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint._src.serialization import replica_slices

from model import checkpoint, decoder, disk, train
from model import checkpoint_writing as writing
from sharding.errors import UserError
from sharding.mesh import make_mesh
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


def test_on_gpus_nothing_is_put_into_pinned_memory_to_be_saved(tmp_path, monkeypatch):
    """XLA grants 64 GB of it per process, and the state of 7B parameters takes more."""
    moved, whole = [], replica_slices.transfer_arrays_to_host

    def spy(*args, enable_pinned_host_transfer, **kwargs):
        moved.append(enable_pinned_host_transfer)
        return whole(*args, enable_pinned_host_transfer=enable_pinned_host_transfer, **kwargs)

    monkeypatch.setattr(replica_slices, "transfer_arrays_to_host", spy)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    writing.save_state(str(tmp_path / "state"), {"step": jnp.ones(3)})()
    assert set(moved) == {False}  # None would leave it to Orbax


def test_a_link_to_nothing_is_the_user_s(tmp_path):
    (tmp_path / "C").symlink_to(tmp_path / "own")
    with pytest.raises(UserError, match="C is a link to nothing"):
        writing.is_taken(str(tmp_path / "C"))


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_no_byte_is_read_twice_whatever_the_mesh(tmp_path):
    """Arrays that four devices saved, cut along fsdp, on meshes that cut them along other axes."""
    config = tiny.config(hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    optimizer = optax.adamw(1e-3)

    def shapes(*sizes):
        params = decoder.abstract(config, make_mesh(*sizes))
        return {"params": params, "optimizer": train.optimizer_state(optimizer, params)}

    state = jax.tree.map(
        lambda x: jax.device_put(
            np.random.default_rng(x.size).random(x.shape).astype(x.dtype), x.sharding
        ),
        shapes(1, 4, 1),
    )
    writing.save_state(str(tmp_path / "state"), state)()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    for sizes in ((1, 4, 1), (1, 1, 4), (4, 1, 1), (1, 2, 2), (2, 1, 2)):
        wanted, before = shapes(*sizes), bytes_read()
        loaded = writing.load_state(str(tmp_path / "state"), wanted)
        assert size < bytes_read() - before < 1.05 * size, sizes
        assert jax.tree.structure(loaded) == jax.tree.structure(state)
        for x, was, shape in zip(*map(jax.tree.leaves, (loaded, state, wanted))):
            assert x.sharding == shape.sharding and x.dtype == shape.dtype
            np.testing.assert_array_equal(x, was)
