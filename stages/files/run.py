"""From the command line to an exit code: 0 done, 2 the caller's mistake, 75 stopped by a signal.

Everything else is a bug of ours and ends with a traceback. Runs without JAX.
"""

import contextlib
import errno
import signal
import sys
from collections.abc import Callable, Iterator

import tyro

from sharding.errors import UserError

# What a disk or its owner refuses, wherever it comes up. A missing or an existing file is the
# caller's mistake only where a stage looks for it, and says so there.
REFUSED_BY_DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}


class Stopped(Exception):
    """Stopped by a signal, all work saved: the same command goes on. Exit code 75."""


STOPPED_TOGETHER = Stopped("stopped with the other processes, the work is saved")


def run_main(main: Callable, args_type: type, argv: list[str] | None = None, several=None) -> int:
    """Parse `args_type` (a dataclass) from the command line, run main(args), give the exit code.

    several: sharding.watch, for a command that several processes do together: it names a process
    that died, and ends this one with the others.
    """
    args = tyro.cli(args_type, args=argv, description=sys.modules[main.__module__].__doc__)
    code = 1
    try:
        code = _exit_code(main, args, several)
    finally:
        if several is not None:
            several.end(code)
    return code


def _exit_code(main: Callable, args, several) -> int:
    try:
        main(args)
    except UserError as error:
        if several is not None:
            several.settle()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in REFUSED_BY_DISK:
            raise
        path = f"{error.filename}: " if error.filename else ""
        print(f"error: {path}{error.strerror}: make room or give another path", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as stop:
        print(f"{str(stop) or 'stopped'}: run the same command again to go on", file=sys.stderr)
        return 75
    return 0


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], None]]:
    """Turn SIGTERM and SIGINT into a flag; yields `check()`, which raises Stopped once it is up.

    Call it where the work is saved: between steps, never inside a write. A second SIGINT
    interrupts at once.
    """
    received: list[int] = []

    def handler(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    def check():
        if received:
            raise Stopped(f"stopped by {signal.Signals(received[0]).name}, the work is saved")

    previous = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
