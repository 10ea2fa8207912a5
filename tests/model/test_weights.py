"""Safetensors files: every bit is kept; a damaged or hostile header is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from etils import epath

from model.weights import stored_tensors, write_tensors
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
        ([], b""),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, header, body):
    text = json.dumps(header).encode()
    path = epath.Path(tmp_path / "model.safetensors")
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(UserError, match=r"it is damaged or cut off; download it again"):
        stored_tensors(path)


@pytest.mark.parametrize("content", [b"", b"abc", (2**63).to_bytes(8, "little") + b"{}"])
def test_what_is_no_such_file_is_refused(tmp_path, content):
    path = epath.Path(tmp_path / "model.safetensors")
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"it is damaged or cut off; download it again"):
        stored_tensors(path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    files = [epath.Path(tmp_path / f"{i}.safetensors") for i in range(2)]
    for file in files:
        write_tensors(file, {"a": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match=r"1\.safetensors: tensor a is in .*0\.safetensors too"):
        stored_tensors(*files)
