"""What chips can do, as their makers publish it; and the memory that is free here.

Sources: TPUs cloud.google.com/tpu/docs/{v5e,v5p,v6e}; GPUs NVIDIA's data sheets of the SXM
versions, dense, without sparsity. scripts/plan/slices.py combines chips into slices.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. Rates are per second."""

    name: str
    kinds: tuple[str, ...]  # beginnings of jax's device_kind
    memory: float  # bytes that a program may use
    bf16: float  # FLOP/s of matrix products
    fp32: float  # the same where fp32 means fp32 (model/precision.py)
    read: float  # bytes/s of memory
    links: float  # bytes/s over all links to other chips together, one way
    ports: int  # how many links, to neighbours on a torus; 0: a switch
    network: float  # bytes/s to other hosts, this chip's share; on a TPU pod that is the torus too
    host: int  # chips of the largest host

    def flops(self, dtype: str) -> float:
        return self.bf16 if dtype == "bfloat16" else self.fp32


def _chip(name, kinds, gib, bf16, fp32, read, links, ports, network, host) -> Chip:
    """gib: memory in GiB; bf16, fp32: TFLOP/s; read, links, network: GB/s."""
    rates = (bf16 * 1e12, fp32 * 1e12, read * 1e9, links * 1e9)
    return Chip(name, kinds, gib * GIB, *rates, ports, network * 1e9, host)


# A TPU multiplies in bf16: at HIGHEST an fp32 product is six bf16 products. GPUs have units for
# fp32; tf32, which rounds to 10 bits, is not used. Memory: what the runtime leaves of the nominal
# 32, 16, 95, 32, 40, 80, 80 and 141 GB.
_CHIPS = [
    _chip("v4", ("TPU v4",), 31.25, 275, 275 / 6, 1228, 270, 6, 270, 4),
    _chip("v5e", ("TPU v5 lite", "TPU v5e"), 15.75, 197, 197 / 6, 819, 200, 4, 200, 8),
    _chip("v5p", ("TPU v5",), 95, 459, 459 / 6, 2765, 600, 6, 600, 4),
    _chip("v6e", ("TPU v6",), 31.25, 918, 918 / 6, 1638, 400, 4, 400, 8),
    _chip("a100-40", ("NVIDIA A100-SXM4-40GB",), 39, 312, 19.5, 1555, 300, 0, 25, 8),
    _chip("a100-80", ("NVIDIA A100",), 78, 312, 19.5, 2039, 300, 0, 25, 8),
    _chip("h100", ("NVIDIA H100",), 78, 989, 67, 3350, 450, 0, 50, 8),
    _chip("h200", ("NVIDIA H200",), 139, 989, 67, 4800, 450, 0, 50, 8),
]
CHIPS = {chip.name: chip for chip in _CHIPS}


def of_kind(device_kind: str) -> Chip | None:
    """The chip of one of jax's devices; None where it is not in the table."""
    known = [chip for chip in _CHIPS if device_kind.startswith(chip.kinds)]
    return known[0] if known else None


def free_memory(mesh) -> int:
    """Bytes free on all devices of the mesh together; CPU devices share the machine's memory."""
    if mesh.devices.flat[0].platform == "cpu":
        return available_memory()
    stats = [device.memory_stats() for device in mesh.local_devices]
    return mesh.size * min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)


def available_memory() -> int:
    """Bytes that new work on this machine may take: free memory and caches the kernel can drop."""
    with open("/proc/meminfo") as file:
        line = next(line for line in file if line.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])
