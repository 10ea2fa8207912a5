"""Several processes as one: each is given the same command and its own number, each has devices of
its own, and one mesh lies over all of them.

Every process runs the same programs in the same order, since a program that some do not run keeps
the others waiting for ever. So whatever decides what runs next must be the same everywhere: read
from a replicated array, from a file whose content `agree` compared, or asked for here.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from sharding import watch
from sharding.errors import UserError
from sharding.watch import Flags


def start(flags: Flags) -> None:
    """Join the other processes, before anything asks for devices; nothing where this one is alone,
    or where a stage that calls this one has joined them.

    From here on process 0 alone prints to stdout, and sharding/watch.py names one that dies. Raises
    UserError where the flags do not fit together, the processes do not find each other, or were
    given different flags: also one that changes no result may change what programs they run.
    """
    place = flags.place()
    if place is None or distributed.global_state.client is not None:  # alone, or joined before
        return
    explicit = place != "auto"
    # On CPU two programs in flight may meet in their collectives, in another order in each process,
    # and wait for good: with one device a process this runs them one after the other. (The queues
    # of accelerators keep their order.)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # JAX's own watch comes after ours: it aborts, and names nobody.
    patience = {
        "initialization_timeout": int(watch.ARRIVAL),
        "heartbeat_timeout_seconds": int(4 * watch.timeout()),
    }
    try:
        if explicit:
            watch.start(*place)
        jax.distributed.initialize(*(place if explicit else ()), **patience)
        if not explicit:
            address = distributed.global_state.coordinator_address
            watch.start(address, jax.process_count(), jax.process_index())
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"--coordinator {place[0] if explicit else place}: {line}") from None
    places = {field.name for field in dataclasses.fields(Flags)}
    same = {name: x for name, x in dataclasses.asdict(flags).items() if name not in places}
    if not agree(json.dumps(same, default=str)):
        raise UserError("the processes were given different flags: give all the same command")
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def is_first() -> bool:
    """Whether this is the process that writes and tells."""
    return jax.process_index() == 0


def wait() -> None:
    """Until all processes are here: what process 0 wrote before it, the others find after it."""
    from_all(0)


def from_first(values: np.ndarray) -> np.ndarray:
    """Process 0's `values` in all processes; they have one shape and dtype everywhere."""
    if jax.process_count() == 1:
        return values
    _nothing_in_flight()
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def _nothing_in_flight() -> None:
    """With several devices a process programs still overlap on CPU, see `start`: not these."""
    if jax.default_backend() == "cpu":
        jax.block_until_ready(jax.live_arrays())


def from_all(value: int) -> list[int]:
    """Each process's `value`, in order."""
    if jax.process_count() == 1:
        return [value]
    _nothing_in_flight()
    return multihost_utils.process_allgather(np.int32(value)).tolist()


def all_check(check: Callable[[], None], of_another: Exception) -> None:
    """Call `check`; where it raises in any process, raise in all: its own exception, in the others
    `of_another`."""
    raised = None
    try:
        check()
    except Exception as error:
        raised = error
    if any(from_all(raised is not None)):
        raise raised or of_another


def agree(text: str) -> bool:
    """Whether all processes hold the same `text`."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
    return 1 not in from_all(int((from_first(digest) != digest).any()))


if __name__ == "__main__":  # where the environment says who is who: HOST:PORT PROCESSES PROCESS_ID
    jax.distributed.initialize(initialization_timeout=int(watch.ARRIVAL))
    found = distributed.global_state
    print(found.coordinator_address, found.num_processes, found.process_id)
