"""What the pieces of `scripts.bench accelerator` are measured with: time, memory, the two rates."""

import dataclasses
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from model import generate, slot_state
from model.precision import matmul_precision, precision_of
from scripts.bench import shapes
from scripts.bench.machine import timed
from scripts.bench.shapes import Sizes
from sharding.chips import available_memory
from sharding.errors import first_line

Row = dict  # "name" and figures, their units in the keys


class Skip(Exception):
    """The piece cannot run here, for this reason."""


@dataclasses.dataclass
class Given:
    """What a piece works with. end: when its time is over, on the monotonic clock. rates: what was
    measured already."""

    sizes: Sizes
    end: float
    rates: dict[str, float]
    tiny: bool = False

    def left(self) -> float:
        """Seconds that the piece may still take."""
        return self.end - time.monotonic()

    def rate(self, name: str) -> float:
        """Bytes/s of "copy", or FLOP/s of products of a dtype; measured at the first call."""
        if name not in self.rates:
            self.rates[name] = copy_rate(self) if name == "copy" else product_rate(self, name)
        return self.rates[name]

    def seconds(self, run: Callable[[], object]) -> float:
        """Median seconds of run(), after one to warm up: three times, and on up to eleven times as
        long as the whole takes no more than two seconds."""
        jax.block_until_ready(run())
        took, begun = [], time.perf_counter()
        while len(took) < 3 or (len(took) < 11 and time.perf_counter() - begun < 2):
            took.append(timed(lambda: jax.block_until_ready(run()))[0])
            if self.left() < took[-1]:
                break
        return statistics.median(took)


# ----------------------------------------------------------------------------- measuring


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


class DecodeCall:
    """The sampling engine's compiled loop over full slots: a call gives the seconds of one step.

    compiling: seconds. steps: the tokens that the last call drew in each slot.
    """

    def __init__(self, config, params, sampling, slots: int, length: int, dtype):
        self.params, self.slots, self.length = params, slots, length
        precision = precision_of(dtype)
        self.state, random = slot_state.empty(config, slots, length, precision), shapes.Random()
        for layer, kv in enumerate(self.state["cache"]):
            self.state["cache"][layer] = tuple(random.normal(x.shape, x.dtype) for x in kv)
        self.limit = sampling.max_new_tokens
        for name, column in self.state["settings"].items():
            self.state["settings"][name] = jnp.full_like(column, getattr(sampling, name))
        self.state = self._from_the_start()
        self.compiling, self.program = timed(
            lambda: slot_state.advance.lower(
                self.params,
                self.state,
                jnp.int32(0),
                jnp.int32(slot_state.STEPS_PER_CALL),
                config=config,
                precision=precision,
                side_buffer=generate.side_buffer(jax.default_backend()),
            ).compile()
        )

    def _from_the_start(self) -> dict:
        """All slots as many tokens before the cache is full as a call draws."""
        steps = min(slot_state.STEPS_PER_CALL, self.limit)
        return self.state | {
            "active": jnp.ones(self.slots, bool),
            "keys": jnp.arange(2 * self.slots, dtype=jnp.uint32).reshape(self.slots, 2),
            "prompt_lengths": jnp.full(self.slots, self.length - steps, jnp.int32),
            "steps": jnp.ones(self.slots, jnp.int32),
            "limits": jnp.full(self.slots, self.limit, jnp.int32),
            "ignore_eos": jnp.ones(self.slots, bool),
            "last": jnp.full(self.slots, 3, jnp.int32),
        }

    def __call__(self) -> float:
        state = jax.block_until_ready(self._from_the_start())
        limits = jnp.int32(0), jnp.int32(slot_state.STEPS_PER_CALL)
        seconds, (self.state, _) = timed(
            lambda: jax.block_until_ready(self.program(self.params, state, *limits))
        )
        self.steps = int(jnp.max(self.state["steps"])) - 1
        return seconds / self.steps


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

    return turns * 2 * arrays[0].nbytes / given.seconds(once)


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

    return turns * 2 * n**3 / given.seconds(once)
