"""Several processes as one: each is given the same command and its own number, each has devices of
its own, and one mesh lies over all of them.

Every process runs the same programs in the same order, since a program that some do not run keeps
the others waiting for ever. So whatever decides what runs next must be the same everywhere: read
from a replicated array, from a file whose content `agree` compared, or asked for here.
"""

import hashlib
import os
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils


def start(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Join the other processes, before anything asks for devices.

    coordinator: HOST:PORT of process 0, with `processes`, how many there are, and `process_id`,
    which one this is; or "auto", all three from the environment of SLURM or a TPU pod; None: this
    process is alone. From here on process 0 alone prints to stdout. Raises ValueError where they do
    not fit together or do not find each other.
    """
    given = [processes is not None, process_id is not None]
    if coordinator in (None, "auto"):
        if any(given):
            raise ValueError("--processes and --process-id go with --coordinator HOST:PORT")
        arguments = ()
    else:
        if not all(given):
            raise ValueError(f"--coordinator {coordinator} needs --processes and --process-id")
        if not 0 <= process_id < processes:
            raise ValueError(f"--process-id is {process_id}: a number from 0 to {processes - 1}")
        arguments = (coordinator, processes, process_id)
    if coordinator is not None:
        try:
            jax.distributed.initialize(*arguments)
        except (RuntimeError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise ValueError(f"--coordinator {coordinator}: {line}") from None
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
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def from_all(value: int) -> list[int]:
    """Each process's `value`, in order."""
    if jax.process_count() == 1:
        return [value]
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
