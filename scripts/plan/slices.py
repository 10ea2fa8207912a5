"""Slices: chips that work together, and the least time that work takes on them."""

import dataclasses
import math
import os
import re

from sharding.chips import CHIPS, Chip
from sharding.errors import UserError

TORUS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}  # dimensions; GPUs have one
# Cycles per second: the peak in bf16 over what the matrix units do in a cycle.
CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}


@dataclasses.dataclass(frozen=True)
class Slice:
    """v5p:2x2x1, h100:8, or cpu: this machine."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return ":".join(filter(None, (self.chip.name, "x".join(map(str, self.shape)))))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """A slice of up to 8 chips of v5e or v6e is one host; larger ones have 4 chips per host."""
        host = 4 if self.chip.ports and self.size > self.chip.host else self.chip.host
        return -(-self.size // host)

    @property
    def exchange(self) -> float:
        """Bytes/s at which a chip sends and receives in a collective over all of the slice."""
        if not self.chip.ports:
            return self.chip.links if self.hosts == 1 else self.chip.network
        # On a torus an axis of two chips has one link, a longer one two.
        used = sum(min(2, side - 1) for side in self.shape)
        return self.chip.links * used / self.chip.ports

    def times(self, factor: int) -> "Slice":
        """`factor` (a power of two) times as many chips: the shortest side is doubled each time."""
        sides = self.shape
        for _ in range(round(math.log2(factor))):
            sides = sorted([*sorted(sides)[1:], 2 * min(sides)])
        return Slice(self.chip, tuple(sides))

    @property
    def compiler(self) -> str:
        return "tpu" if self.chip.ports else "cuda" if self.shape else "cpu"

    def seconds(self, work: dict, dtype: str) -> dict[str, float]:
        """The least times of a program's products, of reading its memory once and of its exchange,
        and the time of the cycles that a TPU's compiler estimates. work: from compile.py."""
        return {
            "products": work["flops"] / self.chip.flops(dtype),
            "memory": work["bytes"] / self.chip.read,
            "exchange": work["exchange"] / self.exchange if self.size > 1 else 0.0,
            "cycles": work["cycles"] / CLOCK.get(self.chip.name, math.inf),
        }


def parse(topology: str) -> Slice:
    """v5p:2x2x1, h100:8 or cpu, whose rates are measured now, in a second or two."""
    if topology == "cpu":
        from scripts.bench.machine import gemm_rate, read_rate  # here: they load JAX

        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        rates = gemm_rate("JAX", "bfloat16"), gemm_rate("JAX", "float32"), read_rate()
        return Slice(Chip("cpu", (), memory, *rates, math.inf, 0, math.inf, 1), ())
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise UserError(f"{topology}: no chip {name!r} in the table: cpu, {', '.join(CHIPS)}")
    dimensions = TORUS.get(name, 1)
    if not re.fullmatch("x".join([r"[1-9]\d*"] * dimensions), shape):
        example = f"{name}:{('8', '2x4', '2x2x1')[dimensions - 1]}"
        raise UserError(f"{topology!r} is no slice of {name}: write {example}, say")
    return Slice(CHIPS[name], tuple(map(int, shape.split("x"))))
