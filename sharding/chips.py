"""What chips can do, as their makers publish it, and what this CPU does, measured.

Sources: TPUs cloud.google.com/tpu/docs/{v5e,v5p,v6e}; GPUs NVIDIA's data sheets of the SXM
versions, dense, without sparsity.
"""

import dataclasses
import math
import time

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; its rates are a second's."""

    name: str
    kinds: tuple[str, ...]  # how jax's device_kind begins
    memory: float  # bytes that a program may use
    bf16: float  # FLOP/s of matrix products
    fp32: float  # the same where fp32 means fp32 (model/attention.py, matmul_precision)
    read: float  # bytes of memory
    links: float  # bytes over all links to other chips together, one way
    ports: int  # how many links, to neighbours on a torus; 0: a switch
    network: float  # bytes to other hosts, of its share; on a TPU pod that is the torus too
    host: int  # chips of the largest host

    def flops(self, dtype: str) -> float:
        return self.bf16 if dtype in ("bf16", "bfloat16") else self.fp32


# A TPU multiplies in bf16: at HIGHEST an fp32 product is six bf16 products. GPUs have units for
# fp32; tf32, which rounds to 10 bits, is not used. Memory: what the runtime leaves of the nominal
# 32, 16, 95, 32, 40, 80, 80 and 141 GB.
_CHIPS = [
    Chip("v4", ("TPU v4",), 31.25 * GIB, 275e12, 275e12 / 6, 1228e9, 270e9, 6, 270e9, 4),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        15.75 * GIB,
        197e12,
        197e12 / 6,
        819e9,
        200e9,
        4,
        200e9,
        8,
    ),
    Chip("v5p", ("TPU v5",), 95 * GIB, 459e12, 459e12 / 6, 2765e9, 600e9, 6, 600e9, 4),
    Chip("v6e", ("TPU v6",), 31.25 * GIB, 918e12, 918e12 / 6, 1638e9, 400e9, 4, 400e9, 8),
    Chip(
        "a100-40", ("NVIDIA A100-SXM4-40GB",), 39 * GIB, 312e12, 19.5e12, 1555e9, 300e9, 0, 25e9, 8
    ),
    Chip("a100-80", ("NVIDIA A100",), 78 * GIB, 312e12, 19.5e12, 2039e9, 300e9, 0, 25e9, 8),
    Chip("h100", ("NVIDIA H100",), 78 * GIB, 989e12, 67e12, 3350e9, 450e9, 0, 50e9, 8),
    Chip("h200", ("NVIDIA H200",), 139 * GIB, 989e12, 67e12, 4800e9, 450e9, 0, 50e9, 8),
]
CHIPS = {chip.name: chip for chip in _CHIPS}
TORUS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}  # dimensions; GPUs are counted in one


def of_kind(device_kind: str) -> Chip | None:
    """The chip of one of jax's devices; None where it is not in the table."""
    known = [chip for chip in _CHIPS if device_kind.startswith(chip.kinds)]
    return known[0] if known else None


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
    """This machine. rates: FLOP/s of fp32 products and bytes read a second; None: measured now, in
    a second or two."""
    import psutil

    gemm, read = rates or (gemm_rate(), read_rate())
    return Chip(
        "cpu", (), psutil.virtual_memory().total, gemm, gemm, read, math.inf, 0, math.inf, 1
    )


def gemm_rate() -> float:
    """fp32 FLOP/s of XLA's matrix product at PairRM's shapes: a hundred in a row."""
    import jax
    import jax.numpy as jnp

    x, w = jnp.ones((2048, 1024)), jnp.ones((1024, 4096))
    product = jax.jit(lambda x, w: jnp.dot(x, w, precision="highest"))
    product(x, w).block_until_ready()
    begun = time.perf_counter()
    for _ in range(100):
        product(x, w).block_until_ready()
    return 100 * 2 * x.shape[0] * w.size / (time.perf_counter() - begun)


def read_rate() -> float:
    """Bytes per second at which a large array is read, the best of ten."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((128, 1 << 20))
    total = jax.jit(lambda x: jnp.sum(x, axis=1))
    total(x).block_until_ready()
    best = math.inf
    for _ in range(10):
        begun = time.perf_counter()
        total(x).block_until_ready()
        best = min(best, time.perf_counter() - begun)
    return x.nbytes / best
