"""Folders of models as Hugging Face stores them: where they come from, what lies in them.

A folder may come from anyone: no code in it is run, and no link leads out of it. model/tensors.py
reads the files of weights.
"""

import atexit
import fnmatch
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable

from etils import epath

from sharding.errors import UserError, check_scheme, first_line

LARGEST_SIZES = {"num_hidden_layers": 10_000}  # of others: whatever an int32 holds
FLOAT32 = 2.0**-126, 2.0**127


def local_folder(src: str, files: list[str], revision: str = "main") -> tuple[str, str | None]:
    """(local folder, commit on the hub or None) of a folder or a hub id, ORG/NAME.

    `files`: patterns of the names to fetch from the hub or an object store. A folder of an object
    store is copied for as long as this process lives. Raises UserError.
    """
    check_scheme(src)
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
    largest = LARGEST_SIZES.get(name, 2**31 - 1)
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
