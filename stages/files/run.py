"""From the command line to an exit code: 0 done, 2 the caller's mistake, 75 stopped by a signal."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

from sharding import watch
from sharding.errors import UserError


class Stopped(Exception):
    """Stopped by a signal, all work saved: the same command goes on. Exit code 75."""


STOPPED_TOGETHER = Stopped("stopped with the other processes, the work is saved")


def run_main(main: Callable, args_type: type, argv: list[str] | None = None) -> int:
    """Parse `args_type` (a dataclass) from the command line, run main(args), give the exit code."""
    import tyro

    args = tyro.cli(args_type, args=argv, description=sys.modules[main.__module__].__doc__)
    code = 1
    try:
        code = _run(main, args)
    finally:
        watch.end(code)
    return code


def _run(main: Callable, args) -> int:
    try:
        main(args)
    except UserError as error:
        watch.settle()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        print(f"error: {error.filename}: {error.strerror}: give another path", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as stop:
        note = str(stop) or "stopped"
        print(f"{note}: run the same command again to go on", file=sys.stderr)
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


def parse_bytes(text: str, flag: str) -> int:
    """Bytes that a text like 8GiB, 500MB or 4096 names."""
    units = {
        "": 1,
        **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
        **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
    }
    number = text.rstrip("KMGTiB")
    unit = text[len(number) :].strip()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"{flag} is {text!r}: give a size such as 8GiB or 500MB")
    return size
