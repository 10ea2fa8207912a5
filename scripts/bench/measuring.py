"""What the pieces of `scripts.bench accelerator` are measured with: time, memory, the two rates."""

import dataclasses
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from model.kv_cache import available_memory
from model.precision import matmul_precision
from scripts.bench import shapes
from scripts.bench.shapes import Sizes
from sharding.errors import first_line

Row = dict  # "name" and figures, their units in the keys


class Skip(Exception):
    """The piece cannot run here, for this reason."""


class Clock:
    """Seconds that a piece may still take."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


@dataclasses.dataclass
class Given:
    """What a piece works with. rates: what `rates` measured, where it has run before."""

    sizes: Sizes
    clock: Clock
    rates: dict[str, float]
    tiny: bool

    def rate(self, name: str, measure: Callable[["Given"], float]) -> float:
        if name not in self.rates:
            self.rates[name] = measure(self)
        return self.rates[name]


# ----------------------------------------------------------------------------- measuring


def median_seconds(run: Callable[[], object], clock: Clock, most: float = 2.0) -> float:
    """Median seconds of run(), after one to warm up: three times, and on up to eleven times as long
    as the whole takes no more than `most` seconds."""
    jax.block_until_ready(run())
    took, begun = [], time.perf_counter()
    while len(took) < 3 or (len(took) < 11 and time.perf_counter() - begun < most):
        start = time.perf_counter()
        jax.block_until_ready(run())
        took.append(time.perf_counter() - start)
        if clock.left() < took[-1]:
            break
    return statistics.median(took)


def out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "OUT_OF_MEMORY" in str(error)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:300]


def memory_limit() -> int:
    """Bytes that programs may use on the device; on CPU what is free."""
    stats = jax.devices()[0].memory_stats()  # None on CPU
    return stats["bytes_limit"] if stats else available_memory()


def facts() -> dict:
    """The device and the versions of what is measured."""
    device = jax.devices()[0]
    packages = "jax jaxlib flax optax orbax-checkpoint numpy".split()
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": len(jax.devices()),
        "memory_limit_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in packages},
    }


# --------------------------------------------------------------------------------- rates


def rounds() -> int:
    """Passes over the arrays that are timed together: on an accelerator so many that waiting for
    the last one does not count."""
    return 1 if jax.default_backend() == "cpu" else 8


def copy_rate(given: Given) -> float:
    """Bytes read and written per second by passes over large arrays in place, in turns over four of
    them, so that no cache holds them."""
    random, turns = shapes.Random(), 4 * rounds()
    arrays = [random.normal((given.sizes.copied,)) for _ in range(4)]
    negate = jax.jit(lambda x: -x, donate_argnums=0)

    def once():
        for i in range(turns):
            arrays[i % 4] = negate(arrays[i % 4])
        return arrays

    return turns * 2 * arrays[0].nbytes / median_seconds(once, given.clock)


def product_rate(given: Given, dtype, out=None) -> float:
    """FLOP/s of square matrix products of `dtype`, as model/decoder.py multiplies: float32 in full
    precision. out: dtype of the result."""
    random, n, turns = shapes.Random(), given.sizes.product, 3 * rounds()
    if jax.default_backend() == "cpu":
        n = min(n, 2048)  # a larger one takes many seconds and is no faster
    pairs = [(random.normal((n, n), dtype), random.normal((n, n), dtype)) for _ in range(3)]
    product = jax.jit(
        lambda x, w: jnp.dot(x, w, precision=matmul_precision(x.dtype), preferred_element_type=out)
    )

    def once():
        for i in range(turns):
            last = product(*pairs[i % 3])
        return last

    return turns * 2 * n**3 / median_seconds(once, given.clock)


def bf16_rate(given: Given) -> float:
    return product_rate(given, jnp.bfloat16)
