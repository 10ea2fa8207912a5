"""Files of weights: every bit is kept; what is damaged or hostile is refused."""

import json
import os
import pickle
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from etils import epath

from model.tensors import stored_tensors, write_tensors
from model.weights import check_links, local_folder, weight_files
from sharding.errors import UserError


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_bit_survives_writing_and_reading(tmp_path, dtype):
    """All 2¹⁶ patterns of 16 bits (as many of 32): NaN payloads, subnormals and −0 among them."""
    bits = np.arange(2**16, dtype=np.uint16)
    if dtype == np.float32:
        bits = bits.astype(np.uint32) * 65537
    tensors = {"a": bits.view(dtype).reshape(256, 256), "b": bits[:6].view(dtype).reshape(2, 3)}
    path = epath.Path(tmp_path / "model.safetensors")
    write_tensors(path, tensors)
    stored, theirs = stored_tensors(path), safetensors.torch.load_file(path)
    assert stored.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = stored[name].read()
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype.type, tensor.shape)
        assert read.tobytes() == tensor.tobytes()
        assert bytes(theirs[name].view(torch.uint8).numpy()) == tensor.tobytes()


def test_whoever_may_read_the_folder_may_read_the_file(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o755)
    write_tensors(epath.Path(folder / "model.safetensors"), {"a": np.zeros(2, np.float32)})
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, body",
    [
        ({"a": entry(), "b": entry()}, b"1234"),  # two tensors over the same bytes
        ({"a": entry(), "b": entry(offsets=(8, 12))}, b"1234--------"),  # bytes of no tensor
        ({"a": entry(offsets=(0, 2))}, b"12"),  # fewer bytes than the shape takes
        ({"a": entry(offsets=(0, 400))}, b"1234"),  # beyond the end
        ({"a": entry(shape=(-1,))}, b"1234"),
        ({"a": entry(shape=(2**62, 4), offsets=(0, 0))}, b""),  # overflows
        ({"a": entry(dtype="F33")}, b"1234"),
        ({"a": {"dtype": "F32"}}, b"1234"),
        ({"a": entry(offsets=(4, 0))}, b"1234"),
        ({"a": entry(offsets=(-4, 0))}, b"1234"),
        ({"a": entry(shape=(2**64,))}, b"1234"),
        ({"a": entry(shape=("1",))}, b"1234"),
        ({"a": entry(), "__metadata__": {"format": 5}}, b"1234"),
        ({"a": entry(), "__metadata__": []}, b"1234"),
        ({"a": None}, b""),
        ({"a": [[[]]] * 1000}, b""),
        ([], b""),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, header, body):
    text = json.dumps(header).encode()
    path = epath.Path(tmp_path / "model.safetensors")
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(UserError, match=r"it is damaged or cut off; download it again"):
        stored_tensors(path)


def framed(header: bytes, claimed: int | None = None) -> bytes:
    return (len(header) if claimed is None else claimed).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        framed(b"{}", 2**63),
        framed(b"{}", 2**60),
        framed(b"{}", 3),
        framed(b""),
        framed(b"[" * 100_000),
        framed(b'{"a":' * 100_000),
        framed(b'{"a": 1e999999}'),
        framed(b'{"\xff": {}}'),
        framed(b" " * 100_000_001),  # above the format's limit
    ],
    ids=range(12),
)
def test_what_is_no_such_file_is_refused(tmp_path, content):
    path = epath.Path(tmp_path / "model.safetensors")
    path.write_bytes(content)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"it is damaged or cut off; download it again"):
        stored_tensors(path)
    assert time.monotonic() - begun < 2


def test_a_tensor_in_two_files_is_refused(tmp_path):
    files = [epath.Path(tmp_path / f"{i}.safetensors") for i in range(2)]
    for file in files:
        write_tensors(file, {"a": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match=r"1\.safetensors: tensor a is in .*0\.safetensors too"):
        stored_tensors(*files)


# ---------------------------------------------------------------------- PyTorch's files


class Evil:
    """Would make a file if its pickle were run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pytorch_files_are_read_bit_for_bit(tmp_path, dtype, zipped):
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits if dtype != torch.float32 else bits.astype(np.uint32) * 65537
    values = torch.from_numpy(bits.copy()).view(dtype).reshape(256, 256)
    state = {"a": values, "b": values[::2, 3:9].t(), "c": torch.nn.Parameter(values[:1])}
    state["x.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float64)
    path = epath.Path(tmp_path / "pytorch_model.bin")
    torch.save(state, str(path), _use_new_zipfile_serialization=zipped)
    stored = stored_tensors(path)
    assert list(stored) == ["a", "b", "c"]
    for name, tensor in stored.items():
        theirs = state[name].detach().contiguous()
        assert tensor.shape == tuple(theirs.shape) and tensor.read().dtype == tensor.dtype
        assert tensor.read().tobytes() == bytes(theirs.view(torch.uint8).numpy())


def save(content, **kwargs):
    return lambda path: torch.save(content, path, **kwargs)


@pytest.mark.parametrize(
    "write, problem",
    [
        (lambda path: path.write_bytes(b""), "it is damaged"),
        (lambda path: path.write_bytes(b"PK\3\4 and no zip"), "it is damaged"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "damaged"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "it is damaged"),
        (save([torch.ones(2)]), "no state dict: save model.state_dict"),
        (save({"state_dict": {"a": torch.ones(2)}, "epoch": 1}), "no state dict"),
        (save({"a": torch.ones(2), "b": 3.0}), "no state dict"),
        (save(torch.nn.Linear(2, 2)), "holds more than tensors, and none of that is run"),
        (save({"a": torch.ones(2, dtype=torch.int8)}), "tensor a is torch.int8; F32, F16, BF16"),
        (save({"a": torch.ones(2, dtype=torch.complex64)}), "tensor a is torch.complex64"),
        (save({"a": torch.ones(2, 2).to_sparse()}), "tensor a is damaged"),
        (save({"a": torch.ones(2, device="meta")}), "tensor a is damaged"),
        (save({"a": torch.ones(1).expand(2**40)}), "tensor a is damaged: the file does not hold"),
    ],
    ids=range(13),
)
def test_what_is_no_state_dict_is_refused(tmp_path, write, problem):
    path = tmp_path / "pytorch_model.bin"
    write(path)
    with pytest.raises(UserError, match=rf"pytorch_model\.bin: .*{problem}"):
        stored_tensors(epath.Path(path))


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_is_run(tmp_path, zipped):
    path = tmp_path / "pytorch_model.bin"
    content = {"a": torch.ones(2), "b": Evil(tmp_path / "run")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="it holds more than tensors, and none of that is run"):
        stored_tensors(epath.Path(path))
    assert not (tmp_path / "run").exists()


def test_a_pytorch_file_cut_off_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for zipped in (True, False):
        torch.save({"a": torch.ones(64)}, path, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
        for size in range(0, len(content) - 1, len(content) // 9):
            path.write_bytes(content[:size])
            with pytest.raises(UserError, match=r"pytorch_model\.bin: it is damaged"):
                stored_tensors(epath.Path(path))


def test_without_pytorch_its_install_is_named(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "pytorch_model.bin")
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="not installed: pip install torch, or save the weights as"):
        stored_tensors(path)


# ---------------------------------------------------------------------- an index, and links


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "../x.safetensors", "/x.safetensors", "a/b.safetensors"]
    + ["", ".", "..", "x.bin", "x", ".safetensors/..", "a\0.safetensors", None, 5, [], {}],
)
def test_an_index_names_no_file_outside_its_folder(tmp_path, name):
    for stem, end in (("model.safetensors", "safetensors"), ("pytorch_model.bin", "bin")):
        folder = tmp_path / end
        folder.mkdir()
        index = {"weight_map": {"a": f"good.{end}", "b": name if name != "x.bin" else "x.pt"}}
        (folder / f"{stem}.index.json").write_text(json.dumps(index))
        (tmp_path / "x.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match=r"index\.json: weight_map names .*, which is no \."):
            weight_files(str(folder))


def test_safetensors_go_before_pytorch_files(tmp_path):
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        weight_files(str(tmp_path))
    (tmp_path / "model.safetensors").mkdir()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert weight_files(str(tmp_path)) == [epath.Path(tmp_path / "pytorch_model.bin")]
    (tmp_path / "a.safetensors").write_bytes(b"")
    index = {"weight_map": {"x": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(str(tmp_path)) == [epath.Path(tmp_path / "a.safetensors")]


@pytest.fixture
def secret(tmp_path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text("{}")
    (tmp_path / "model").mkdir()
    return tmp_path / "outside" / "secret.json"


@pytest.mark.parametrize("link", ["absolute", "relative", "chain", "to nothing", "device", "home"])
def test_a_link_out_of_a_folder_is_refused(tmp_path, secret, link):
    file = tmp_path / "model" / "config.json"
    if link == "chain":
        (tmp_path / "model" / "hop").symlink_to(secret)
    file.symlink_to(
        {
            "absolute": secret,
            "relative": "../outside/secret.json",
            "chain": "hop",
            "to nothing": tmp_path / "outside" / "none",
            "device": "/dev/zero",
            "home": "../model/../outside/secret.json",
        }[link]
    )
    with pytest.raises(UserError, match=r"model/config\.json is a link to .*, out of its folder"):
        local_folder(str(tmp_path / "model"), ["*.json"])


@pytest.mark.parametrize("link", ["additional_chat_templates", "additional_chat_templates/x.jinja"])
def test_named_chat_templates_are_no_links_either(tmp_path, secret, link):
    templates = tmp_path / "model" / "additional_chat_templates"
    (secret.parent / "x.jinja").write_text("secret")
    if link.endswith("jinja"):
        templates.mkdir()
        (templates / "x.jinja").symlink_to(secret.parent / "x.jinja")
    else:
        templates.symlink_to(secret.parent)
    with pytest.raises(UserError, match=r"x\.jinja is a link to .*, out of its folder"):
        check_links(str(tmp_path / "model"), ["*.jinja"])


def test_a_folder_beside_of_a_longer_name_is_outside(tmp_path):
    for name in ("model", "model-other"):
        (tmp_path / name).mkdir()
    (tmp_path / "model-other" / "config.json").write_text("{}")
    (tmp_path / "model" / "config.json").symlink_to("../model-other/config.json")
    with pytest.raises(UserError, match="out of its folder"):
        check_links(str(tmp_path / "model"), ["*"])


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json is no regular file"):
        check_links(str(tmp_path), ["*"])


def test_links_inside_a_folder_and_files_that_are_not_read_are_left_alone(tmp_path, secret):
    folder = tmp_path / "model"
    (folder / "a.json").write_text("{}")
    (folder / "config.json").symlink_to("a.json")
    (folder / "notes.txt").symlink_to(secret)
    (folder / "logs").symlink_to(tmp_path / "outside")
    (tmp_path / "link").symlink_to(folder)
    for name in (folder, tmp_path / "link", os.path.relpath(folder)):
        assert local_folder(str(name), ["*.json"]) == (str(name), None)


def test_a_snapshot_links_to_its_own_blobs_alone(tmp_path, secret):
    root = tmp_path / "hub" / "models--org--name"
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "blobs" / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    check_links(str(snapshot), ["*"])
    (snapshot / "generation_config.json").symlink_to("../../../../outside/secret.json")
    with pytest.raises(UserError, match=r"generation_config\.json is a link"):
        check_links(str(snapshot), ["*"])
    (snapshot / "generation_config.json").unlink()
    (root / "blobs" / "123").unlink()
    (root / "blobs").rmdir()
    (root / "blobs").symlink_to(secret.parent)  # the blobs themselves lead out
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/secret.json")
    with pytest.raises(UserError, match=r"config\.json is a link"):
        check_links(str(snapshot), ["*"])
