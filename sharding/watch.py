"""Several processes that work together know of each other's end. Runs without JAX.

Every process keeps a connection to process 0, at the port behind the coordinator's, and sends a
sign of life over it once a second. One that dies (its connection ends), vanishes (no sign of life
for PROCESS_TIMEOUT seconds) or fails is named by all the others on stderr, in one line, and they
end too: with exit code 75 or, where it failed by the caller's mistake, 2. What they saved is there:
the same command goes on. Without this they would wait in their next collective, or be aborted by
JAX with a stack trace that names nobody.
"""

import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection, wait

from sharding.errors import UserError

BEAT = 1.0  # seconds between two signs of life
ARRIVAL = 600.0  # seconds within which all must have come: one may still be installing packages
GRACE = 2.0  # seconds until another's death is surely known, where it made this process fail too
LONGEST = 1000  # bytes of a message
LEFT = "left"  # what a process says, and is called from then on, that ends as it should


def timeout() -> float:
    """PROCESS_TIMEOUT: seconds after which a silent process counts as dead."""
    text = os.environ.get("PROCESS_TIMEOUT") or "100"
    if not text.replace(".", "", 1).isdigit() or float(text) < 2 * BEAT:
        raise UserError(f"PROCESS_TIMEOUT={text}: give seconds, at least {2 * BEAT:.0f}")
    return float(text)


@dataclasses.dataclass(kw_only=True)
class Flags:
    """The flags of every stage that several processes can do together."""

    coordinator: str | None = None
    """Several processes as one: HOST:PORT of process 0 (that port and the next are used), or "auto"
    (SLURM, TPU pods). Default: $COORDINATOR."""
    processes: int | None = None
    """How many, with --coordinator HOST:PORT. Default: $PROCESSES."""
    process_id: int | None = None
    """Which one this is: 0, … Default: $PROCESS_ID."""

    def place(self) -> tuple[str, int, int] | str | None:
        """(HOST:PORT, how many, which one), "auto", or None where this process is alone, with what
        the environment says where a flag is not given. UserError: they do not fit together."""
        coordinator = self.coordinator or os.environ.get("COORDINATOR") or None
        if coordinator in (None, "auto"):
            if (self.processes, self.process_id) != (None, None):
                raise UserError("--processes and --process-id go with --coordinator HOST:PORT")
            return coordinator
        numbers = []
        for name, number in (("PROCESSES", self.processes), ("PROCESS_ID", self.process_id)):
            text = os.environ.get(name, "") if number is None else str(number)
            if not text.isdigit():
                raise UserError(
                    f"--coordinator {coordinator} needs --processes and --process-id: {name} is "
                    f"{text!r}, no whole number"
                )
            numbers.append(int(text))
        processes, me = numbers
        if not 0 <= me < processes:
            raise UserError(f"--process-id is {me}: a number from 0 to {processes - 1}")
        port = coordinator.rpartition(":")[2]
        if not port.isdigit() or not 0 < int(port) < 65535:
            raise UserError(f"--coordinator {coordinator}: give HOST:PORT, a port below 65535")
        return coordinator, processes, me


class Watch:
    """Connections to the others: process 0 has one to each, they have one to process 0."""

    def __init__(self, coordinator: str, processes: int, me: int):
        """Wait until all are there; UserError says who is not, or why none can be reached."""
        self.me, self.silence = f"process {me} ({socket.gethostname()})", timeout()
        self.links: dict[Connection, str] = {}  # to whom
        self.last: tuple[int, str] | None = None  # exit code and line, once the end has come
        self.ending: int | None = None  # this process's own exit code, once it has one
        host, _, port = coordinator.rpartition(":")
        deadline = time.monotonic() + ARRIVAL
        if me == 0:
            self._accept(int(port) + 1, processes, deadline)
        else:
            self._connect(host.strip("[]"), int(port) + 1, deadline)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _accept(self, port: int, processes: int, deadline: float) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
        except OSError as error:
            raise UserError(f"port {port}: {error.strerror}: give another") from None
        with server:
            missing = set(range(1, processes))
            while missing:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    link = Connection(server.accept()[0].detach())
                except TimeoutError:
                    raise UserError(
                        f"process {', '.join(map(str, sorted(missing)))} of {processes} did not "
                        f"come within {ARRIVAL:.0f} s"
                    ) from None
                name = _hello(link)
                number = name.removeprefix("process ").partition(" ")[0]
                if number.isdigit() and int(number) in missing:
                    missing.remove(int(number))
                    self.links[link] = name
                else:  # somebody else's connection
                    link.close()
        self._send(self.me)  # all are there: from here on everyone is heard

    def _connect(self, host: str, port: int, deadline: float) -> None:
        error: Exception | str = "nobody answers"
        while (left := deadline - time.monotonic()) > 0:
            try:
                link = Connection(socket.create_connection((host, port), timeout=5).detach())
                os.set_blocking(link.fileno(), True)
                link.send_bytes(self.me.encode())
                if name := _hello(link, left):
                    self.links[link] = name
                    return
            except OSError as found:
                error = found
            time.sleep(0.1)
        raise UserError(
            f"process 0 did not say within {ARRIVAL:.0f} s, from {host}, port {port}, that all are "
            f"there ({error})"
        )

    def _run(self) -> None:
        silent, beat = dict.fromkeys(self.links, 0), 0.0
        patience = 5  # beats, once the end has come
        while self.links and patience:
            for link in wait(list(self.links), BEAT / 2):
                silent[link] = 0
                try:
                    message = link.recv_bytes(LONGEST).decode()
                except (EOFError, OSError):
                    name = self.links.pop(link)
                    if name != LEFT:
                        self._end(75, f"{name} died: run the same command again, on all, to go on")
                    continue
                if message == LEFT:
                    self.links[link] = LEFT
                elif self.last and message:
                    del self.links[link]
                elif message:
                    code, _, line = message.partition(" ")
                    self._end(int(code), line)
            if time.monotonic() - beat >= BEAT:
                # Beats, not seconds: a machine that slept has heard nothing, and missed nothing.
                beat = time.monotonic()
                patience -= self.last is not None
                self._send("")
                for link, name in self.links.items():
                    silent[link] += 1
                    if silent[link] > self.silence / BEAT:
                        self._end(
                            75,
                            f"{name} has been silent for {self.silence:.0f} s: run the "
                            "same command again, on all, to go on",
                        )
        if self.last:
            code, line = self.last
            if line and code != self.ending:  # else this process has said why itself
                os.write(2, f"\n{line}\n".encode())  # below a progress bar
            os._exit(code)

    def _end(self, code: int, line: str) -> None:
        """The end of all, with this exit code; the others are told, process 0 tells it on."""
        if self.last is None:
            self.last = code, line
            self._send(f"{code} {line}")

    def _send(self, message: str) -> None:
        for link in list(self.links):
            with contextlib.suppress(OSError):  # it is gone: reading says so
                link.send_bytes(message.encode()[:LONGEST])

    def leave(self) -> None:
        """This process is done, and may end before the others."""
        self._send(LEFT)

    def alone(self, seconds: float) -> bool:
        """Whether another does not leave within so many seconds."""
        end = time.monotonic() + seconds
        while others := [name for name in list(self.links.values()) if name != LEFT]:
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        return bool(others)

    def finish(self, code: int) -> None:
        """This process ends with `code`, and all others with it; does not return."""
        what = "was stopped" if code == 75 else f"ended with exit code {code}, see what it said"
        line = f"{self.me} {what}: run the same command again, on all, to go on" if code else ""
        # For this process alone there is nothing more to say, and its own code counts.
        self.last = code, ""
        self._send(f"{code if code in (0, 2) else 75} {line}")
        self.thread.join()
        os._exit(code)  # there were no others


def _hello(link: Connection, seconds: float = 5) -> str:
    """Who is at the other end; "" where nobody says so."""
    try:
        return link.recv_bytes(LONGEST).decode() if link.poll(seconds) else ""
    except (OSError, EOFError, UnicodeDecodeError):
        return ""


# ----------------------------------------------------------------------- of this process

_watch: Watch | None = None


def start(coordinator: str, processes: int, me: int) -> None:
    global _watch
    _watch = Watch(coordinator, processes, me)
    # JAX aborts this process the moment process 0's connection breaks; sleep(SIGABRT) instead is
    # six seconds in which its name can be told.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)


def settle() -> None:
    """Before a failure is told: where another's death is its cause, that is told instead, and this
    does not return."""
    if _watch is not None:
        time.sleep(GRACE)


def end(code: int) -> None:
    """Call it last, with this process's exit code. One that fails, or stops while others go on,
    does not return from here: JAX would wait for the others, and they for it."""
    if _watch is None:
        return
    _watch.ending = code
    if code in (0, 75):
        _watch.leave()
        if code == 0 or not _watch.alone(2 * GRACE):
            return
    else:
        settle()
    if sys.exception() is not None:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    _watch.finish(code)
