"""Paths, local or in an object store (gs://…): reading, hashing, writing whole or not at all."""

import hashlib
import io
import os

from etils import epath

from sharding.errors import UserError


def is_remote(path: str) -> bool:
    """Whether `path` is in an object store, gs://… say: what can be written once, whole."""
    return "://" in str(path)


def local_path(path: str) -> str:
    """Where the unfinished file of `path` grows: beside it, or, since object stores cannot append,
    in the user's cache folder under a name made from the whole path: the same machine goes on from
    it, another one begins anew."""
    if not is_remote(path):
        return str(path)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "iterative-preference-alignment")
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f"{text_sha256(str(path))[:16]}-{os.path.basename(path)}")


def open_input(path: str):
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{path} does not exist: give the path of a file")
    if file.is_dir():
        raise UserError(f"{path} is a folder: give the path of a file")
    opened = file.open("rb")
    # An object store's file asks for its data anew at each line, where it is not buffered.
    return io.BufferedReader(opened, 1 << 22) if is_remote(path) else opened


def file_sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open_input(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def publish(local: str, path: str):
    """Move a finished local file to where it belongs, whole or not at all."""
    if is_remote(path):
        epath.Path(local).copy(path, overwrite=True)
        os.unlink(local)
    else:
        os.replace(local, path)


def write_atomically(path: str, text: str):
    """Write a whole file, or leave what was there."""
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        epath.Path(path).write_text(text)
        return
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
