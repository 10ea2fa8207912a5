"""A lock on a folder or file to be written, against other processes of this machine."""

import contextlib
import os
from collections.abc import Iterator

from model.disk import MARK
from stages.files.paths import local_path, make_folder, try_lock


def lock_file(path: str) -> str:
    """Where the lock of `path` lies."""
    return f"{local_path(path)}.lock{MARK}"


@contextlib.contextmanager
def lock(path: str) -> Iterator[None]:
    """Hold `path`, a folder or file to be written, against other processes of this machine.

    Raises UserError where another process holds it. The lock is a file beside `path`, gone at the
    end; a killed process holds nothing.
    """
    file = lock_file(path)
    make_folder(os.path.dirname(file) or ".")
    while True:
        opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try_lock(opened, path)
            if os.path.exists(file) and os.path.samestat(os.fstat(opened), os.stat(file)):
                break
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)  # its owner removed it between the two calls
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)
        os.close(opened)
