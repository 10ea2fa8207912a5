"""The one error for the caller's mistake, raised wherever the mistake is known; and other
libraries' errors in one line, or as the disk's."""

import contextlib
import os
import re
from collections.abc import Iterator

# Where the number of the disk's error stands in the texts of Orbax, and of safetensors.
DISK_ERROR = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")


class UserError(ValueError):
    """The caller's mistake: one line that says what, where and how to mend it. Exit code 2."""


def check_scheme(path: str, name: str = "") -> None:
    """Raise UserError for every scheme but gs://. name: the flag, for that line."""
    scheme, separator, _ = str(path).partition("://")
    if separator and scheme != "gs":
        raise UserError(
            f"{name} {path}: {scheme}:// is not supported: give a local path or gs://…".lstrip()
        )


def first_line(error: Exception) -> str:
    """The first line of an error's text that is not blank; its repr if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


@contextlib.contextmanager
def as_os_error(path: str) -> Iterator[None]:
    """Raise an error of the disk, which other libraries hide in classes of their own, as the
    OSError that it is; `path` is what was being written."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        match = DISK_ERROR.search(str(error))
        if match is None:
            raise
        number = int(match[1] or match[2])
        raise OSError(number, os.strerror(number), path) from error
