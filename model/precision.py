"""Precision: what matrix products multiply, and what lies between them.

Every product of model/ rounds its operands to the dtype of computation and gives float32; softmax,
norms, losses, log-probs and sums are float32. Parameters are stored in float32 for training, in the
dtype of computation for sampling and ranking.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Precision(NamedTuple):
    """operands: what products multiply, the dtype of computation. activations: what lies between
    the products, and in a KV cache."""

    operands: jnp.dtype
    activations: jnp.dtype

    @property
    def rounds_operands(self) -> bool:
        """Whether a product rounds its operands: in bf16 on a CPU, where activations are fp32."""
        return self.operands != self.activations


FLOAT32 = Precision(jnp.dtype("float32"), jnp.dtype("float32"))


def precision_of(dtype, platform: str | None = None) -> Precision:
    """The precision of computing in `dtype` on a platform (default: JAX's own).

    On CPUs bf16 is the dtype of operands alone: there elementwise work in bf16 is slower than in
    float32, and attention gains nothing from it.
    """
    dtype = jnp.dtype(dtype)
    on_cpu = (platform or jax.default_backend()) == "cpu"
    return Precision(dtype, jnp.dtype("float32") if on_cpu else dtype)


def resolved(dtype: str, platform: str | None = None) -> str:
    """The dtype of computation that a flag names. "auto": bfloat16 on accelerators, and on CPUs
    that multiply it in hardware; else float32."""
    if dtype != "auto":
        return dtype
    on_cpu = (platform or jax.default_backend()) == "cpu"
    return "bfloat16" if not on_cpu or cpu_multiplies_bf16() else "float32"


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 products: AMX or AVX-512."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:  # not Linux
        return False
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags)


def matmul_precision(dtype) -> jax.lax.Precision:
    """HIGHEST for fp32, whose operands accelerators would otherwise round to bf16 or tf32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def product(equation: str, a: jax.Array, b: jax.Array, operands) -> jax.Array:
    """The einsum of a and b, rounded to the dtype `operands`, in float32."""
    return jnp.einsum(
        equation,
        a.astype(operands),
        b.astype(operands),
        precision=matmul_precision(operands),
        preferred_element_type=jnp.float32,
    )
