"""fp32 means fp32: the precision of every matrix product in model/."""

import jax
import jax.numpy as jnp


def matmul_precision(dtype) -> jax.lax.Precision:
    """HIGHEST for fp32, whose operands accelerators would otherwise round to bf16 or tf32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
