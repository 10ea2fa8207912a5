"""Tensors as Hugging Face stores them: tables that say where each lies, and files that hold them.

A table says where each tensor lies on either side and how its axes go over, so that both directions
of a conversion read the same line:

    HF name → (our path, HF's axes, our axes)
    "model.layers.{}.self_attn.q_proj.weight": ("layers/q", "nh d", "d n h")

Axes are letters whose sizes the config gives (`axis_sizes`). Letters written together are one axis
of HF's: the rows of a q_proj.weight [nh, d] are n heads of h each.
"""

import dataclasses
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from model.disk import naming
from sharding.errors import UserError, first_line

STORED_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


# ---------------------------------------------------------------------- tables of tensors


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one HF tensor lies in our parameters."""

    path: tuple[str | int, ...]
    layer: int | None  # index along the stacked axis
    hf_axes: tuple[str, ...]
    our_axes: tuple[str, ...]

    def hf_shape(self, config) -> tuple[int, ...]:
        sizes = config.axis_sizes
        return tuple(math.prod(sizes[letter] for letter in axis) for axis in self.hf_axes)

    def to_ours(self, config, tensor: np.ndarray) -> np.ndarray:
        """The HF tensor with our axes: a view."""
        sizes, letters = config.axis_sizes, "".join(self.hf_axes)
        split = tensor.reshape([sizes[letter] for letter in letters])
        return split.transpose([letters.index(axis) for axis in self.our_axes])

    def to_hf(self, config, ours: np.ndarray) -> np.ndarray:
        """Our tensor with HF's axes, contiguous."""
        letters = "".join(self.hf_axes)
        split = ours.transpose([self.our_axes.index(letter) for letter in letters])
        return np.ascontiguousarray(split.reshape(self.hf_shape(config)))


def table_slots(table: dict[str, tuple[str, str, str]], layers: int) -> dict[str, Slot]:
    """The tensors of a table by HF name. "{}" is the layer: if it stands in the name alone, our
    layers are stacked; if it stands in the path too, they are a list."""
    slots = {}
    for layer in (None, *range(layers)):
        for name, (path, hf_axes, our_axes) in table.items():
            if ("{}" in name) == (layer is None):
                continue
            keys = tuple(layer if key == "{}" else key for key in path.split("/"))
            stacked = layer if layer not in keys else None
            axes = tuple(hf_axes.split()), tuple(our_axes.split())
            slots[name.format(layer)] = Slot(keys, stacked, *axes)
    return slots


def check_tensors(folder: str, config, wanted: dict[str, Slot], stored: dict, more: set[str]):
    """Check that `stored` (name → StoredTensor or its like) has every wanted tensor in the shape
    that the config gives it, and beside them only those in `more`. UserError names the tensor."""
    for name, slot in wanted.items():
        if name not in stored:
            raise UserError(f"{folder}: tensor {name} is missing: download the folder again")
        shape, expected = tuple(stored[name].shape), slot.hf_shape(config)
        if shape != expected:
            raise UserError(
                f"{stored[name].file}: tensor {name} is {list(shape)}, config.json makes it "
                f"{list(expected)}: the two belong to different models"
            )
    for name in sorted(stored.keys() - wanted.keys() - more):
        if not _is_harmless(name):
            raise UserError(
                f"{stored[name].file}: tensor {name} has no place in this architecture "
                "(a bias, an adapter, another model?): remove it only if it is not used"
            )


def _is_harmless(name: str) -> bool:
    """RoPE's frequencies and position numbers in old conversions: we compute both."""
    return name.endswith((".rotary_emb.inv_freq", ".position_ids"))


# ---------------------------------------------------------------------- files of tensors


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor inside a file of weights; its values are read by `read`."""

    file: str
    dtype: type
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def stored_tensors(*files: epath.Path) -> dict[str, StoredTensor]:
    """The tensors of these files by name. Only the files' headers are read."""
    tensors = {}
    for file in files:
        inside = _torch_tensors(file) if file.suffix == ".bin" else _safe_tensors(file)
        for name, kind, shape, read in inside:
            if kind not in STORED_DTYPES:
                if _is_harmless(name):
                    continue
                raise UserError(
                    f"{file}: tensor {name} is {kind}; {', '.join(STORED_DTYPES)} are built: "
                    "take the unquantized model"
                )
            if name in tensors:
                other = tensors[name].file
                raise UserError(f"{file}: tensor {name} is in {other} too: keep one of them")
            tensors[name] = StoredTensor(str(file), STORED_DTYPES[kind], shape, read)
    return tensors


def _safe_tensors(file: epath.Path) -> Iterator[tuple]:
    """(name, kind, shape, function that reads it) of each tensor of a safetensors file, whose
    header `safe_open` checks against the file's size."""
    try:
        opened = safe_open(str(file), framework="np")
    except SafetensorError as error:
        raise UserError(
            f"{file} ({file.stat().length} bytes): it is damaged or cut off; "
            f"download it again ({first_line(error)})"
        ) from None
    for name in opened.offset_keys():
        stored = opened.get_slice(name)
        shape = tuple(stored.get_shape())
        yield name, stored.get_dtype(), shape, partial(opened.get_tensor, name)


def _torch_tensors(file: epath.Path) -> Iterator[tuple]:
    """The same of a file that PyTorch wrote. Its pickle is read as data: nothing in it is run."""
    try:
        import torch  # here: seconds, and only these files need it
    except ImportError:
        raise UserError(
            f"{file} is read by PyTorch, which is not installed: pip install torch, or save the "
            "weights as model.safetensors"
        ) from None

    is_zip = zipfile.is_zipfile(str(file))  # the older format cannot be mapped into memory
    try:
        if is_zip:
            _check_zip(str(file))
        state = torch.load(str(file), map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises whatever its parsers raise
        refused = "Unsupported global" in str(error) or "Unsupported class" in str(error)
        what = "it holds more than tensors, and none of that is run" if refused else "it is damaged"
        raise UserError(
            f"{file}: {what}: download it again, or take the model as safetensors"
        ) from error
    if not isinstance(state, dict) or not all(torch.is_tensor(x) for x in state.values()):
        raise UserError(f"{file}: it is damaged or no state dict: save model.state_dict() alone")
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def read(tensor):
        tensor = tensor.detach()
        if tensor.dtype != torch.bfloat16:
            return tensor.numpy()
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)

    for name, tensor in state.items():
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{file}: tensor {name} is damaged: the file does not hold its values")
        kind = kinds.get(tensor.dtype, str(tensor.dtype))
        yield str(name), kind, tuple(tensor.shape), partial(read, tensor)


def _check_zip(file: str) -> None:
    """Raise an error if a record of a zip file is damaged, which mapping it would not notice. Only
    records that are stored as they are count as whole: no other grows as it is read."""
    with zipfile.ZipFile(file) as opened:
        compressed = [
            info for info in opened.infolist() if info.compress_type != zipfile.ZIP_STORED
        ]
        if compressed or opened.testzip() is not None:
            raise zipfile.BadZipFile(file)


def write_tensors(path: epath.Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one safetensors file."""
    metadata = {"format": "pt"}  # what transformers expects
    if "://" not in str(path):
        with naming(str(path)):
            save_file(tensors, str(path), metadata)
        # safetensors lets only the owner read; the folder says who may.
        os.chmod(path, os.stat(path.parent).st_mode & 0o666)
        return
    with tempfile.TemporaryDirectory() as local:
        with naming(local):
            save_file(tensors, f"{local}/{path.name}", metadata)
        epath.Path(f"{local}/{path.name}").copy(path)
