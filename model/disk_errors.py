"""A full or failing disk, which other libraries hide in errors of their own."""

import contextlib
import os
import re
from collections.abc import Iterator

# Where the number of the disk's error stands in the texts of Orbax, and of safetensors.
DISK_ERROR = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")


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
