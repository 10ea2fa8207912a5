"""Several processes as one: each is given the same command and its own number, each has devices of
its own, and one mesh lies over all of them.

Every process runs the same programs in the same order, since a program that some do not run keeps
the others waiting for ever. So whatever decides what runs next must be the same everywhere: read
from a replicated array, from a file whose content `agree` compared, or asked for here.

A process that ends before the others ends them too. Each keeps a sign of life in the store of JAX's
coordination service; one that fails leaves its exit code and its reason there. The others say in
one line who it was, and end with exit code 75, or 2 where it failed by the caller's mistake. What
was saved is kept, so the same command goes on. When process 0 dies, JAX may abort the others, since
the service runs there: that gives 75 as well.

Importing this file loads no JAX.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
from etils import epy

from sharding.errors import UserError, first_line

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax
    from jax._src import distributed
    from jax.experimental import multihost_utils

BEAT = 0.5  # seconds between two signs of life
ASKING = 1.0  # seconds between two exchanges in a loop of whether it should stop
ARRIVAL = 600  # seconds to wait for all at the start: one may still be installing packages
GRACE = 6  # beats to wait, after a failure here, for the news that another process died
AGAIN = "run the same command again, on all, to go on"
ABORTED = f"aborted: unless the lines above tell of a fault, another process died: {AGAIN}"

_others: "_Others | None" = None  # once this process has joined others


@dataclasses.dataclass(kw_only=True)
class Flags:
    """The flags of every stage that several processes can do together."""

    coordinator: str | None = None
    """Run as one of several processes: HOST:PORT of process 0, or "auto" (SLURM, TPU pods).
    Default: $COORDINATOR."""
    processes: int | None = None
    """How many processes, with --coordinator HOST:PORT. Default: $PROCESSES."""
    process_id: int | None = None
    """The number of this process, from 0. Default: $PROCESS_ID."""

    def place(self) -> tuple[str, int, int] | str | None:
        """(HOST:PORT, how many, which one), "auto", or None where this process is alone. The
        environment stands in for flags that are not set. UserError: they do not fit together."""
        coordinator = self.coordinator or os.environ.get("COORDINATOR") or None
        if coordinator in (None, "auto"):
            if (self.processes, self.process_id) != (None, None):
                raise UserError("--processes and --process-id go with --coordinator HOST:PORT")
            return coordinator
        numbers = []
        for name, number in (("PROCESSES", self.processes), ("PROCESS_ID", self.process_id)):
            text = os.environ.get(name, "") if number is None else str(number)
            if not text.isdecimal() or len(text) > 6:
                raise UserError(
                    f"--coordinator {coordinator} needs --processes and --process-id: {name} is "
                    f"{text!r}, no whole number below 1,000,000"
                )
            numbers.append(int(text))
        processes, me = numbers
        if not 0 <= me < processes:
            raise UserError(f"--process-id is {me}: a number from 0 to {processes - 1}")
        port = coordinator.rpartition(":")[2]
        if not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 65536:
            raise UserError(f"--coordinator {coordinator}: give HOST:PORT, a port below 65536")
        return coordinator, processes, me


def start(flags: Flags) -> None:
    """Join the other processes, before anything asks for devices. Does nothing where this process
    is alone, or has joined them already.

    From here on process 0 alone prints to stdout. Raises UserError where the flags do not fit
    together, the processes do not find each other, or their flags differ: even a flag that changes
    no result may change which programs they run.
    """
    global _others
    place = flags.place()
    if place is None or _others is not None:
        return
    # On CPU, collectives of two programs in flight may come in another order in each process, and
    # wait for ever. With one device per process this runs programs one after the other.
    # (Accelerators' queues keep their order.)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM
    others = _Others()
    try:
        jax.distributed.initialize(
            *(place if place != "auto" else ()),
            initialization_timeout=ARRIVAL,
            heartbeat_timeout_seconds=int(4 * others.timeout),  # it aborts, and names nobody
        )
    except (RuntimeError, ValueError) as error:
        others.close()
        where = place if place == "auto" else place[0]
        raise UserError(f"--coordinator {where}: {first_line(error)}") from None
    state = distributed.global_state
    others.me, others.count, others.client = state.process_id, state.num_processes, state.client
    others.say()  # before `agree`, so that all know of a process that dies right after it
    _others = others
    places = {field.name for field in dataclasses.fields(Flags)}
    same = {name: x for name, x in dataclasses.asdict(flags).items() if name not in places}
    if not agree(json.dumps(same, default=str)):
        raise UserError("the processes were given different flags: give all the same command")
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return _others is None or jax.process_index() == 0


def wait() -> None:
    """Wait until all processes call this: what process 0 wrote before, the others can then read."""
    from_all(0)


def from_first(values: np.ndarray) -> np.ndarray:
    """Process 0's `values`, in all processes. Shape and dtype are the same everywhere."""
    if _others is None:
        return values
    _nothing_in_flight()
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def _nothing_in_flight() -> None:
    """On CPU, wait for all programs: with several devices per process they overlap (`start`)."""
    if jax.default_backend() == "cpu":
        jax.block_until_ready(jax.live_arrays())


def from_all(value: int) -> list[int]:
    """Each process's `value`, in order."""
    if _others is None:
        return [value]
    _nothing_in_flight()
    return multihost_utils.process_allgather(np.int32(value)).tolist()


def all_check(check: Callable[[], None], of_another: Exception) -> None:
    """Call `check`. If it raises an exception of `of_another`'s class in any process, raise in all:
    there the exception itself, in the others `of_another`."""
    raised = None
    try:
        check()
    except type(of_another) as error:
        raised = error
    if any(from_all(raised is not None)):
        raise raised or of_another


def loop_check(check: Callable[[], None], of_another: Exception) -> Callable[[], None]:
    """`all_check` for a loop: every process calls it in each round, and about every ASKING seconds
    they exchange the results. Each time they agree on the rounds until the next exchange."""
    if _others is None:
        return check
    every, left, asked = 1, 1, time.monotonic()

    def check_now_and_then() -> None:
        nonlocal every, left, asked
        left -= 1
        if not left:
            all_check(check, of_another)
            now = time.monotonic()
            mine = min(2 * every, int(every * ASKING / max(now - asked, 1e-3)))
            every = left = max(1, min(from_all(mine)))
            asked = now

    return check_now_and_then


def agree(text: str) -> bool:
    """Whether all processes hold the same `text`."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
    return 1 not in from_all(int((from_first(digest) != digest).any()))


# ------------------------------------------------------------------------------ the end of a run


def leave() -> None:
    """End a run in which no process failed: wait until all are here."""
    if _others is not None:
        wait()
        _others.close()


def fail(code: int, text: str) -> None:
    """End this process with `code`, and all others with it; returns only where it is alone. text:
    why, for the user. If another process's death is the cause, that is said instead."""
    if _others is not None:
        if code != 75:
            beats = _others.said[1] + GRACE + 1  # a dead process's last beat may be heard late
            while _others.said[1] < beats and _others.thread.is_alive():
                time.sleep(BEAT / 5)
            _others.name_the_dead((GRACE - 1) * BEAT)
        why = f"process {_others.me} ({_others.said[0]}): {text.splitlines()[-1]}"
        _others.end(code, text, why)


class _Others:
    """A thread that tells the other processes of this one, and notes what they tell."""

    def __init__(self):
        text = os.environ.get("PROCESS_TIMEOUT") or "100"
        if not text.replace(".", "", 1).isdecimal() or not 2 <= float(text) <= 1e6:
            raise UserError(f"PROCESS_TIMEOUT={text}: give seconds, from 2 to 1,000,000")
        self.timeout, self.client, self.me, self.count = float(text), None, 0, 1
        self.said = [socket.gethostname(), 0, 0, ""]  # host, beats, exit code, why it ends
        # What each process said last, and for how many seconds it has been silent since.
        self.heard: dict[str, tuple[list, float]] = {"0": (self.said, 0.0)}
        self.over, self.ending = threading.Event(), threading.Lock()
        # The main thread handles no signal while it waits for the others, so the thread reads them.
        self.signals, received = socket.socketpair()
        received.setblocking(False)
        signal.set_wakeup_fd(received.detach(), warn_on_full_buffer=False)
        # JAX aborts a process when process 0, which holds the service, has died. Python's own
        # handlers run too late for an abort.
        self._aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._aborted)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        signals = 0
        while not self.over.is_set():
            if select.select([self.signals], [], [], BEAT)[0]:
                number, signals = self.signals.recv(1)[0], signals + 1
                # A loop's own handler saves its work first; a second signal ends the process.
                if signals > 1 or signal.getsignal(number) is signal.default_int_handler:
                    text = f"stopped: {AGAIN}"
                    self.end(75, text, f"process {self.me} ({self.said[0]}): {text}")
            if self.client is not None:
                self.said[1] += 1
                try:
                    self.say()
                    self._hear()
                except (RuntimeError, ValueError):
                    self.end(75, f"process 0 ({self.heard['0'][0][0]}) died: {AGAIN}")
                self.name_the_dead(self.timeout)

    def say(self) -> None:
        key, text = f"processes/{self.me}", json.dumps(self.said)
        self.client.key_value_set(key, text, allow_overwrite=True)

    def _hear(self) -> None:
        expected = {f"processes/{number}": str(number) for number in range(self.count)}
        for key, text in self.client.key_value_dir_get_bytes("processes/"):
            name = expected.get(key)
            before, silent = self.heard.get(name, (None, 0.0))
            said = _message(text) or before
            if name is None or said is None:
                continue
            # Own beats are counted, not seconds: a machine that slept has missed no beat.
            self.heard[name] = said, (silent + BEAT if said == before else 0.0)
            _, _, code, why = said
            if why:
                self.end(2 if code == 2 else 75, why)

    def name_the_dead(self, seconds: float) -> None:
        """End the run if a process has been silent for so long."""
        name, (said, silent) = max(self.heard.items(), key=lambda item: item[1][1])
        if silent >= seconds:
            how = "died" if seconds < self.timeout else f"has been silent for {seconds:.0f} s"
            self.end(75, f"process {name} ({said[0]}) {how}: {AGAIN}")

    def end(self, code: int, text: str, why: str = "") -> None:
        """Print `text`, tell the other processes `why` (default: `text`), and end."""
        self.ending.acquire()  # never released: whoever comes second waits for the end
        self.said[2:] = code, why or text
        if self.client is not None:
            with contextlib.suppress(RuntimeError, ValueError):  # process 0 is gone
                self.say()
                time.sleep(10 * BEAT if self.me == 0 else 0)  # the store ends with process 0
        os.write(2, f"\n{text}\n".encode(errors="replace"))  # last, below a progress bar
        os._exit(code)

    def _abort(self, _) -> None:
        # Waits for `end` for a while only: JAX aborts with a lock held that `end` may wait for.
        self.ending.acquire(timeout=2 * GRACE * BEAT)
        code, why = self.said[2:]
        os.write(2, f"\n{why or ABORTED}\n".encode())
        os._exit(code or 75)

    def close(self) -> None:
        # Once joined, the handler stays: JAX leaves its service only when Python ends, and aborts
        # if process 0 has ended the service before.
        if self.client is None:
            ctypes.CDLL(None).signal(signal.SIGABRT, None)
        self.over.set()
        self.thread.join()
        signal.set_wakeup_fd(-1)


def _message(text: bytes) -> list | None:
    """A process's message: its host, beats, exit code and why it ends. None for anything else: who
    reaches the port can write into the store."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = [type(value) for value in said] if isinstance(said, list) else []
    return said if kinds == [str, int, int, str] else None


if __name__ == "__main__":  # where the environment says who is who: HOST:PORT PROCESSES PROCESS_ID
    jax.distributed.initialize(initialization_timeout=ARRIVAL)
    state = distributed.global_state
    print(state.coordinator_address, state.num_processes, state.process_id)
