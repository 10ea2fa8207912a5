"""Paths, on a disk or in an object store (gs://…): opening, hashing, locking, writing whole or not
at all. Runs without JAX.

A path is normalised once, where it enters; two paths are the same file if the file system says so.
Whatever is written for a while only has MARK in its name, so that no file of a user's is replaced.
"""

import fcntl
import hashlib
import io
import os

from etils import epath

from model.disk import MARK, naming, put_in_place
from sharding.errors import UserError, check_scheme

# First bytes of files that hold no lines to read, and what to say of such a file.
PACKED = {
    b"\x1f\x8b": "is compressed by gzip: unpack it first (gunzip)",
    b"BZh": "is compressed by bzip2: unpack it first (bunzip2)",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it first (unzstd)",
    b"\x04\x22\x4d\x18": "is compressed by lz4: unpack it first (unlz4)",
    b"\xfd7zXZ\0": "is compressed by xz: unpack it first (unxz)",
    b"7z\xbc\xaf\x27\x1c": "is compressed by 7-Zip: unpack it first (7z x)",
    b"PK\x03\x04": "is compressed by zip: unpack it first (unzip)",
    b"PAR1": "is a Parquet file: scripts.convert reads a folder of them",
}


def is_remote(path: str) -> bool:
    """Whether `path` is in an object store, where a file is written once, whole."""
    return "://" in str(path)


def normalised(path: str, flag: str) -> str:
    """`path` without slashes at its end. Raises UserError for an empty one, and for every scheme
    but gs://; `flag` names the flag in that line."""
    check_scheme(path, flag)
    if not path:
        raise UserError(f"{flag} is empty: give a path")
    return str(path).rstrip("/") or "/"


def check_place(path: str, flag: str) -> None:
    """Raise UserError if `path` is something that no file may replace: a folder, pipe or device."""
    if normalised(path, flag) != str(path) or epath.Path(path).is_dir():
        raise UserError(f"{path} is a folder: give the path of the file to write")
    if is_special(path):
        raise UserError(f"{path} is no regular file: give the path of the file to write")


def is_special(path: str) -> bool:
    """Whether `path` is a pipe or a device, which epath takes for a file."""
    there = not is_remote(path) and os.path.exists(path)
    return there and not (os.path.isfile(path) or os.path.isdir(path))


def check_distinct(inputs: dict[str, str], outputs: dict[str, str]) -> None:
    """Raise UserError where an output is also an input or another output.

    inputs, outputs: path by flag or role. The file system decides whether two paths are the same
    file: symbolic links, hard links and `./` do not hide it. The files that grow beside an output
    belong to it, an input's manifest and the files of a folder to the input.
    """
    taken = {_identity(f"{path}{MANIFEST}"): (flag, path) for flag, path in inputs.items()}
    taken |= {_identity(path): (flag, path) for flag, path in inputs.items()}
    for flag, path in outputs.items():
        for other, folder in inputs.items():
            if _is_part(path, folder):
                raise UserError(
                    f"{flag} {path}: it is a part of the input {folder} ({other}): give another "
                    "path to write to"
                )
        for written in (path, *(f"{path}{end}" for end in BESIDE)):
            other, other_path = taken.get(_identity(written), (None, None))
            if other in inputs:
                raise UserError(
                    f"{flag} {path}: {other_path} is the input ({other}): give another path to "
                    "write to"
                )
            if other is not None and other != flag:
                raise UserError(f"{other} and {flag} are the same file: give each its own")
            taken[_identity(written)] = (flag, path)


# What stages/files/output.py writes beside a file.
MANIFEST = ".manifest.json"
BESIDE = (
    MANIFEST,
    ".set_aside.jsonl",
    *(f".partial{end}" for end in ("", MANIFEST, ".sorted", ".set_aside")),
)


def _identity(path: str):
    """Equal for two paths of one file."""
    if is_remote(path):
        return str(epath.Path(path)) if path.startswith("gs://") else path
    try:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    except OSError:
        return os.path.realpath(path)


def _is_part(path: str, folder: str) -> bool:
    """Whether `path` is there, below `folder`, and was not written by a stage of ours."""
    if is_remote(path) or not os.path.isdir(folder) or not os.path.isfile(path):
        return False
    parents = os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))
    return parents and not os.path.exists(f"{path}{MANIFEST}")


# ---------------------------------------------------------------------- reading


def open_input(path: str) -> io.BufferedReader:
    """The file, open for reading its lines or its text. Raises UserError as `open_any` does, and
    where it is compressed."""
    opened = open_any(path)
    start = opened.read(8)
    for magic, why in PACKED.items():
        if start.startswith(magic):
            raise UserError(f"{path} {why}")
    opened.seek(0)
    return opened


def open_any(path: str) -> io.BufferedReader:
    """The file, open for reading bytes. Raises UserError where there is none, where it is a folder
    or a pipe (a stage reads its input more than once), and for other schemes than gs://."""
    check_scheme(path)
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{path} does not exist: give the path of a file")
    if file.is_dir():
        raise UserError(f"{path} is a folder: give the path of a file")
    if is_special(path):
        raise UserError(f"{path} is a pipe or a device: write its content to a file first")
    opened = file.open("rb")
    if is_remote(path):  # each unbuffered line would ask the object store anew
        opened = io.BufferedReader(opened, 1 << 22)
    return opened


def file_sha256(path: str) -> str:
    """The sha256 of a file's content, 64 hex digits."""
    with open_any(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """The sha256 of a text in UTF-8; halves of surrogate pairs count as they are."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# ---------------------------------------------------------------------- writing


def try_lock(file, path: str) -> None:
    """Lock the open `file`; raise UserError where another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is being written by another process: wait for it") from None
    except OSError:
        pass  # a file system without locks


def make_folder(path: epath.PathLike) -> None:
    """Make a folder, and those above it. Raises UserError where one cannot be made."""
    try:
        epath.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "a file is there" if epath.Path(path).is_file() else error.strerror
        raise UserError(f"the folder {path} cannot be made ({reason}): give another path") from None


def local_path(path: str) -> str:
    """Where the unfinished file of `path` grows: beside it.

    Object stores cannot append, so there it grows in the user's cache folder, under a name made
    from the whole path: the same machine goes on from it, another one begins anew.
    """
    if not is_remote(path):
        return str(path)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "iterative-preference-alignment")
    make_folder(folder)
    return os.path.join(folder, f"{text_sha256(str(path))[:16]}-{os.path.basename(path)}")


def publish(local: str, path: str) -> None:
    """Move a finished local file to `path`, whole or not at all; there it survives a power cut."""
    if is_remote(path):
        epath.Path(local).copy(path, overwrite=True)
        os.unlink(local)
    else:
        put_in_place(local, path)


def write_atomically(path: str, content: str | bytes) -> None:
    """Write a whole file, or leave what was there."""
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    make_folder(epath.Path(path).parent)
    if is_remote(path):
        epath.Path(path).write_bytes(content)
        return
    temporary = f"{path}{MARK}"
    with naming(path), open(temporary, "wb") as file:
        file.write(content)
    publish(temporary, path)
