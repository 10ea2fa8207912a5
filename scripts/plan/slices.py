"""Slices: chips that work together, and this machine as one of them, measured."""

import dataclasses
import math
import os
import time

import jax
import jax.numpy as jnp

from sharding.chips import CHIPS, Chip

TORUS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}  # dimensions; GPUs are counted in one


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that work together: v5p:2x2x1, h100:8, cpu."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """A slice of up to 8 chips of v5e and v6e is one host; a larger one has 4 chips a host."""
        host = self.chip.host
        if self.chip.ports and self.size > host:
            host = 4
        return -(-self.size // host)

    @property
    def exchange(self) -> float:
        """Bytes/s at which a chip sends and receives in a collective over all of the slice."""
        chip = self.chip
        if not chip.ports:
            return chip.links if self.hosts == 1 else chip.network
        # On a torus an axis of two chips has one link, a longer one two.
        used = sum(min(2, side - 1) for side in self.shape)
        return chip.links * used / chip.ports

    def __str__(self) -> str:
        return "cpu" if self.is_cpu else f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def is_cpu(self) -> bool:
        return self.chip.name == "cpu"


def parse(topology: str, cpu_rates: tuple[float, float] | None = None) -> Slice:
    """v5p:2x2x1, h100:8 or cpu (see there). Raises ValueError, in one line, for everything else."""
    if topology == "cpu":
        return Slice(cpu(cpu_rates), (1,))
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise ValueError(f"no chip {name!r} in the table: cpu, {', '.join(CHIPS)}")
    sides = shape.split("x")
    dimensions = TORUS.get(name, 1)
    if len(sides) != dimensions or not all(s.isdigit() and int(s) > 0 for s in sides):
        example = {1: "8", 2: "2x4", 3: "2x2x1"}[dimensions]
        raise ValueError(f"{topology!r} is no slice of {name}: write {name}:{example}, say")
    return Slice(CHIPS[name], tuple(map(int, sides)))


# ------------------------------------------------------------------------- this machine


def cpu(rates: tuple[float, float] | None = None) -> Chip:
    """This machine. rates: FLOP/s of fp32 products and bytes/s of memory; None: they are measured
    now, in a second or two."""
    gemm, read = rates or (gemm_rate(), read_rate())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Chip("cpu", (), memory, gemm, gemm, read, math.inf, 0, math.inf, 1)


def gemm_rate() -> float:
    """FLOP/s of XLA's fp32 matrix product at PairRM's shapes, over a hundred in a row."""
    x, w = jnp.ones((2048, 1024)), jnp.ones((1024, 4096))
    product = jax.jit(lambda x, w: jnp.dot(x, w, precision="highest"))
    product(x, w).block_until_ready()
    begun = time.perf_counter()
    for _ in range(100):
        product(x, w).block_until_ready()
    return 100 * 2 * x.shape[0] * w.size / (time.perf_counter() - begun)


def read_rate() -> float:
    """Bytes per second at which a large array is read, the best of ten."""
    x = jnp.ones((128, 1 << 20))
    total = jax.jit(lambda x: jnp.sum(x, axis=1))
    total(x).block_until_ready()
    best = math.inf
    for _ in range(10):
        begun = time.perf_counter()
        total(x).block_until_ready()
        best = min(best, time.perf_counter() - begun)
    return x.nbytes / best
