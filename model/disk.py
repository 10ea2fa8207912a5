"""Files and folders that survive a power cut, and errors of the disk that name a path. Runs without
JAX.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

MARK = ".iterative-alignment-tmp"  # ends the name of every temporary file and folder
# Where the number of the disk's error stands in the texts of Orbax, and of safetensors.
DISK_ERROR = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")


def put_in_place(temporary: str, path: str) -> None:
    """Give a finished file or folder its name. From then on it survives a power cut, and after one
    before that, `path` is what it was: content first, then the rename, then the folder above."""
    sync(temporary)
    os.replace(temporary, path)
    _sync(os.path.dirname(path) or ".")


def sync(path: str) -> None:
    """Wait until a file, or a folder with all in it, is on the disk."""
    for folder, _, files in os.walk(path):
        for name in files:
            _sync(os.path.join(folder, name))
        _sync(folder)
    if not os.path.isdir(path):
        _sync(path)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot, as some do not for folders
            raise OSError(error.errno, os.strerror(error.errno), path) from error
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Raise an error of the disk as an OSError that names the path which was being written: also
    one that names none, and one that another library hides in a class of its own."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), path) from error
    except Exception as error:
        match = DISK_ERROR.search(str(error))
        if match is None:
            raise
        number = int(match[1] or match[2])
        raise OSError(number, os.strerror(number), path) from error
