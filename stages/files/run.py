"""From the command line to an exit code: 0 done, 2 the caller's mistake, 75 stopped by a signal.

Everything else is a bug of ours and ends with a traceback. Runs without JAX.
"""

import codecs
import contextlib
import errno
import locale
import math
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator

import tyro

from sharding.errors import UserError

# Errors of a disk or of permissions: the caller's mistake, wherever they come up. A missing or an
# existing file is one only where a stage looks for it, and the stage says so.
REFUSED_BY_DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP, errno.ESTALE),
}


SIGNALS = signal.SIGTERM, signal.SIGINT


class Stopped(Exception):
    """Stopped by a signal, all work saved: the same command goes on. Exit code 75."""


AGAIN = "run the same command again to go on"
UNREAD = 128 + signal.SIGPIPE  # the exit code where the reader of the output is gone
STOPPED_TOGETHER = Stopped("stopped with the other processes, the work is saved")


def run_main(main: Callable, args_type: type, argv: list[str] | None = None, several=None) -> int:
    """Parse `args_type` (a dataclass) from the command line, run main(args), return the exit code.

    several: sharding.processes, for a command that several processes run together. If one of them
    fails, the others end with it.
    """
    settle_streams()
    try:
        module = sys.modules[main.__module__]
        spec = module.__spec__  # its name is what one types; argv[0] is the path of the file
        prog = spec and f"python -m {spec.name.removesuffix('.__main__')}"
        args = tyro.cli(args_type, args=argv, prog=prog, description=module.__doc__)
    except (SystemExit, BrokenPipeError):  # after --help
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        if _is_stdout_unread():
            raise SystemExit(UNREAD) from None
        raise
    # A signal ends the command at once, except in the loops, which save their work first.
    previous = {n: signal.signal(n, signal.default_int_handler) for n in SIGNALS}
    code, text = 0, ""
    try:
        try:
            with _second_signal():
                settle_environment()
                check_numbers(args)
                main(args)
                sys.stdout.flush()
        except Stopped as stop:  # all processes stop together
            code, text = 75, f"{stop}: {AGAIN}"
            os.sync()  # the rows so far, which are not synced one by one
        if several is not None:
            several.leave()
    except BaseException as error:
        code, text = _told(error)
        if several is not None:
            several.fail(code, text)
        if code == 1:
            raise
    finally:
        for number, old in previous.items():
            # A process that ran one command is about to end: another signal must not change its
            # exit code.
            signal.signal(number, old if argv is not None else lambda *_: os._exit(code))
    if text and code != UNREAD:  # a closed pipe is no news, as with other tools
        print(text, file=sys.stderr)
    return code


# ------------------------------------------------------------------ before a command begins

# JAX's variables that say where it computes, what it keeps and what it logs. Its other variables
# and Flax's could change a result, or cause an error: JAX_ENABLE_X64, JAX_DISABLE_JIT, …
USED = re.compile(
    r"JAX_(PLATFORM\w*|\w+_DEVICES|LOCAL_DEVICE_IDS|(PARTITION|SLICE)_INDEX|COORDINATOR\w*|PJRT\w*"
    r"|CPU_COLLECTIVES\w*|DISTRIBUTED\w*|SKIP\w*"
    r"|(?!RAISE)\w*CACHE\w*|\w*LOG\w*|\w*DUMP\w*|\w*TRACEBACK\w*)"
)

READ_FLAGS = """
from jaxlib import xla_client
xla_client.CompileOptions().executable_build_options.debug_options
"""


def settle_streams() -> None:
    """Make all output possible: in UTF-8 whatever the locale says, on narrow terminals, and where
    a stream is closed (otherwise the next file that is opened would take its number). Each line is
    written at once, also into a file, so that a process that is killed loses none."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    if shutil.get_terminal_size().columns < 20:
        os.environ["COLUMNS"] = "20"  # in fewer columns, tyro never ends laying out its help


def settle_environment() -> None:
    """Remove variables that would change results from the environment, before JAX reads them.
    Raises UserError if Python would read files in another encoding than UTF-8, or XLA would end the
    process for a flag that it does not know."""
    encoding = locale.getpreferredencoding(False)
    if codecs.lookup(encoding).name != "utf-8":
        raise UserError(f"Python reads files as {encoding}: set PYTHONUTF8=1, or a UTF-8 locale")
    for name in sorted(os.environ):
        if name.startswith(("JAX_", "FLAX_")) and not USED.fullmatch(name):
            value = os.environ.pop(name)
            print(f"{name}={value} is not used: it could change the result", file=sys.stderr)
    if any(option.startswith("error") for option in sys.warnoptions):
        warnings.simplefilter("default")  # no library's warning may end a run
    if (flags := os.environ.get("XLA_FLAGS")) and "jax" not in sys.modules:
        tried = subprocess.run([sys.executable, "-c", READ_FLAGS], capture_output=True, text=True)
        if tried.returncode and (reason := re.match(r"[EF]\d{4} .*?\] (.*)", tried.stderr)):
            raise UserError(f"XLA_FLAGS={flags}: {reason[1]}")


def check_numbers(args) -> None:
    """Raise UserError for a flag that is not finite, or too large or small for products in float32,
    and for a seed or a timeout that Python's libraries refuse. Each command checks its other
    limits."""
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} is {value}: give a finite number")
        if isinstance(value, float) and value and not 1e-30 <= abs(value) <= 1e30:
            raise UserError(f"{flag} is {value}: give 0, or a number of a size from 1e-30 to 1e30")
        if name == "timeout" and value > 1e6:
            raise UserError(f"{flag} is {value}: give at most 1,000,000 seconds")
        if name == "seed" and value < 0:
            raise UserError(f"{flag} is {value}: it must be at least 0")


# ------------------------------------------------------------------------- how a command ends


def _told(error: BaseException) -> tuple[int, str]:
    """(exit code, message) of a command that an exception ended."""
    if isinstance(error, KeyboardInterrupt):
        return 75, f"stopped: {AGAIN}"
    if isinstance(error, BrokenPipeError) and _is_stdout_unread():
        return UNREAD, "nobody reads what it prints"
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if variables := _variables(error):
        return 2, f"error: {variables}: {getattr(error, 'strerror', None) or error}"
    refused = isinstance(error, OSError) and error.errno in REFUSED_BY_DISK
    # Without a path, a socket or a process may have been refused: a bug of ours.
    if refused and (error.filename or not isinstance(error, PermissionError)):
        path = f"{error.filename}: " if error.filename else ""
        return 2, f"error: {path}{error.strerror}: make room or give another path"
    return 1, "".join(traceback.format_exception(error)).rstrip()


def _variables(error: BaseException) -> str:
    """NAME=value of JAX's variables whose value is at fault. JAX reads the variables when it is
    imported, but names only some in its errors; it makes their folders when it writes there."""
    frames = traceback.extract_tb(error.__traceback__)
    read = isinstance(error, ValueError) and frames[-1].filename.endswith("jax/_src/config.py")
    folder = error.filename if isinstance(error, OSError) else None
    return ", ".join(
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith("JAX_")
        and (
            (read and (name.lower() in str(error).lower() or repr(value) in str(error)))
            or (folder and "/" in value and value.startswith(str(folder)))
        )
    )


def _is_stdout_unread() -> bool:
    """Whether stdout is a pipe whose reader has gone (`… | head -1`). If so, stdout becomes
    /dev/null, since Python writes what is left when it ends."""
    poll = select.poll()
    poll.register(1, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


@contextlib.contextmanager
def _second_signal() -> Iterator[None]:
    """Have a second SIGTERM or SIGINT end the process at once; what was saved is kept. A thread
    waits for the signals, since a handler in Python would run only after whatever is being computed
    or compiled. Several processes have a thread of their own (sharding/processes.py)."""
    receiving, sending = socket.socketpair()
    sending.setblocking(False)

    def watch() -> None:
        if receiving.recv(1) and receiving.recv(1):
            os.write(2, f"\nstopped at once, what was saved is kept: {AGAIN}\n".encode())
            os._exit(75)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        now = signal.set_wakeup_fd(before)
        if now != sending.fileno():  # that of sharding.processes, which still needs it
            signal.set_wakeup_fd(now, warn_on_full_buffer=False)
        sending.close()


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], None]]:
    """Turn SIGTERM and SIGINT into a flag; yields `check()`, which raises Stopped once it is set.

    Call `check` where the work can be saved: between steps, never inside a write.
    """
    received: list[int] = []

    def handler(number, frame):
        received.append(number)

    def check():
        if received:
            raise Stopped(f"stopped by {signal.Signals(received[0]).name}, the work is saved")

    previous = {s: signal.signal(s, handler) for s in SIGNALS}
    try:
        yield check
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
