"""Folders of weights as Hugging Face stores them: safetensors files, and tables of their tensors.

A table says where each tensor lies on either side and how its axes go over, so that both directions
of a conversion read the same line:

    HF name → (our path, HF's axes, our axes)
    "model.layers.{}.self_attn.q_proj.weight": ("layers/q", "nh d", "d n h")

Axes are letters whose sizes the config gives (`axis_sizes`). Letters written together are one axis
of HF's: the rows of a q_proj.weight [nh, d] are n heads of h each.
"""

import atexit
import dataclasses
import fnmatch
import json
import math
import os
import re
import shutil
import tempfile

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


# ---------------------------------------------------------------------- folders and their files


def local_folder(src: str, files: list[str], revision: str = "main") -> tuple[str, str | None]:
    """(local folder, commit on the hub or None) of a folder or a hub id, ORG/NAME.

    `files`: patterns of the names to fetch from the hub or an object store. A folder of an object
    store is copied for as long as this process lives. Raises UserError.
    """
    if epath.Path(src).is_dir():
        return (_copied(src, files) if "://" in src else src), None
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", src):
        raise UserError(f"{src} is neither a folder nor a hub id of the form ORG/NAME")
    from huggingface_hub import snapshot_download  # here: half a second, for hub ids alone

    try:
        folder = snapshot_download(src, revision=revision, allow_patterns=files)
    except Exception as error:  # of many kinds: no such model, gated, no network, no space
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = first_line(error)
        if status in (401, 403):  # the hub's own first line says no more than that
            why = (
                f"if the name is right, accept the terms at https://huggingface.co/{src} and set "
                f"HF_TOKEN to a token of yours (HTTP {status})"
            )
        raise UserError(
            f"{src} is no folder here, and the hub does not give it (revision {revision}): {why}"
        ) from None
    return folder, epath.Path(folder).name


def _copied(src: str, files: list[str]) -> str:
    local = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, local, ignore_errors=True)
    for file in epath.Path(src).iterdir():
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in files):
            file.copy(epath.Path(local) / file.name)
    return local


def read_json(path: epath.Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: download it again")
    return content


def weight_files(folder: str) -> list[epath.Path]:
    """The safetensors files of a folder: a single one, or those that its index names."""
    path = epath.Path(folder)
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if not (path / "model.safetensors.index.json").exists():
        raise UserError(
            f"{folder}: neither model.safetensors nor model.safetensors.index.json is there "
            "(other formats are not read: save the model with safe serialization)"
        )
    index = read_json(path / "model.safetensors.index.json")
    if not isinstance(index.get("weight_map"), dict):
        raise UserError(f"{path / 'model.safetensors.index.json'}: weight_map is missing")
    files = [path / name for name in sorted(set(index["weight_map"].values()))]
    for file in files:
        if not file.exists():
            raise UserError(f"{file} is missing, and the index names it: download the folder again")
    return files


# ---------------------------------------------------------------------- safetensors files


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor inside a safetensors file; its values are read by `read`."""

    file: str
    name: str
    dtype: type
    shape: tuple[int, ...]
    opened: safe_open

    def read(self) -> np.ndarray:
        return self.opened.get_tensor(self.name)


def stored_tensors(*files: epath.Path) -> dict[str, StoredTensor]:
    """The tensors of these files by name. Only the files' headers are read."""
    tensors = {}
    for file in files:
        try:
            opened = safe_open(str(file), framework="np")
        except SafetensorError as error:
            raise UserError(
                f"{file} ({file.stat().length} bytes): it is damaged or cut off; "
                f"download it again ({first_line(error)})"
            ) from None
        for name in opened.offset_keys():
            stored = opened.get_slice(name)
            kind = stored.get_dtype()
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
            shape = tuple(stored.get_shape())
            tensors[name] = StoredTensor(str(file), name, STORED_DTYPES[kind], shape, opened)
    return tensors


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
