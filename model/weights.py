"""Folders of weights as Hugging Face stores them: their files, and tables of their tensors.

A folder may come from anyone: no code in it is run, and no link leads out of it.

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
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from model.disk import naming
from sharding.errors import UserError, first_line

LARGEST = {"num_hidden_layers": 10_000}  # of other sizes: whatever an int32 holds
FLOAT32 = 2.0**-126, 2.0**127
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
        check_links(src, files)
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
    check_links(folder, files)
    return folder, epath.Path(folder).name


def local_model(src: str, files: list[str], revision: str = "main") -> tuple[str, str | None]:
    """`local_folder` with the weights: safetensors, or PyTorch's files where there are none."""
    folder, commit = local_folder(src, [*files, "model*.safetensors*"], revision)
    if any(epath.Path(folder).glob("model*.safetensors*")):
        return folder, commit
    return local_folder(src, [*files, "pytorch_model*.bin*"], revision)


def check_links(folder: str, files: Iterable[str]) -> None:
    """Raise UserError if a file of a folder, of a name that one of the patterns `files` matches, is
    a link that leads out of the folder, or a pipe or device. A snapshot in the hub's cache links to
    the blobs beside the snapshots."""
    if "://" in folder:  # object stores have no links
        return
    root = os.path.realpath(folder)
    inside = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        inside.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    path = epath.Path(folder)
    for file in (*path.iterdir(), *path.glob("additional_chat_templates/*")):
        if file.is_dir() or not any(fnmatch.fnmatch(file.name, pattern) for pattern in files):
            continue
        target = os.path.realpath(file)
        if not any(os.path.commonpath([target, place]) == place for place in inside):
            raise UserError(
                f"{file} is a link to {target}, out of its folder: put the file in its place"
            )
        if os.path.exists(target) and not os.path.isfile(target):
            raise UserError(f"{file} is no regular file: put the file in its place")


def _copied(src: str, files: list[str]) -> str:
    local = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, local, ignore_errors=True)
    for file in epath.Path(src).iterdir():
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in files):
            file.copy(epath.Path(local) / file.name)
    return local


def read_json(path: epath.Path, mend: str = "download it again") -> dict:
    """The JSON object in a file. Raises UserError that ends with `mend`."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): {mend}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: {mend}")
    return content


def check_whole(name: str, value: object) -> None:
    """Raise UserError unless a value is a positive whole number that a size can be."""
    largest = LARGEST.get(name, 2**31 - 1)
    if type(value) is not int or not 1 <= value <= largest:
        below = "" if type(value) is not int or value < 1 else f" of at most {largest}"
        raise UserError(f"{name} is {value!r}: it must be a positive whole number{below}")


def check_positive(name: str, value: object) -> None:
    """Raise UserError unless a value is a number that float32 holds, above 0."""
    if not is_number(value) or not FLOAT32[0] <= value <= FLOAT32[1]:
        raise UserError(f"{name} is {value!r}: it must be a number above 0")


def is_number(value: object) -> bool:
    return type(value) in (int, float)


def weight_files(folder: str) -> list[epath.Path]:
    """The files of a folder's weights, a single one or those that an index names: safetensors, or
    PyTorch's where there are none."""
    path = epath.Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").exists():
            return _indexed_files(path / f"{name}.index.json")
    raise UserError(
        f"{folder}: neither model.safetensors nor pytorch_model.bin is there, and no index.json of "
        "either: other formats are not read"
    )


def _indexed_files(index: epath.Path) -> list[epath.Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index}: weight_map is missing")
    ending = index.name.removesuffix(".index.json").rpartition(".")[2]
    for name in names.values():
        if not isinstance(name, str) or not re.fullmatch(rf"[^/\0]+\.{ending}", name):
            raise UserError(f"{index}: weight_map names {name!r}, which is no .{ending} file of it")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, and the index names it: download the folder again")
    return files


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
