"""Attention of one token per row over a KV cache on a TPU, in one kernel that reads only what is
filled: the blocks behind a row's last key, and before its sliding window, are not fetched.

Softmax in one pass, block by block with a running maximum (Dao et al. 2022, Algorithm 1). Keys and
values lie as in model/kv_cache.py, so neither is transposed.

Axis letters: b row, k key/value head, r query head of a key head, h head width, s position.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.precision import matmul_precision

LANES = 128
BLOCK_BYTES = 2**20  # of the keys are fetched at a time: beginning a fetch takes as long as 1 MB


def _block(length: int, bytes_per_position: int) -> int:
    """How many positions a step takes: a multiple of LANES that divides the length."""
    if length % LANES:
        raise ValueError(f"a cache of {length} positions is no multiple of {LANES}")
    blocks = [n for n in range(LANES, length + 1, LANES) if length % n == 0]
    return max(n for n in blocks if n == LANES or n * bytes_per_position <= BLOCK_BYTES)


def attention(q_bkrh, k_bkhs, v_bksh, first_b, end_b, interpret: bool = False):
    """(Σ weights·v, the largest score, Σ weights) over the positions first_b … end_b - 1 of each
    row, fp32 [b, k, r, h], [b, k, r] and [b, k, r]; weights are exp(score - largest). Of no
    positions: (0, -1e30, 0). interpret: run the kernel step by step, on any device."""
    b, k, r, h = q_bkrh.shape
    length = k_bkhs.shape[-1]
    # A row whose answer has ended may be longer than a cache that was cut since.
    end_b = jnp.minimum(end_b, length)
    block = _block(length, k * h * k_bkhs.dtype.itemsize)

    def place(i, j, first_ref, end_ref):
        # For a block that is not needed, a neighbour that is: it is in place, or comes next.
        needed = jnp.clip(j, first_ref[i] // block, jnp.maximum(end_ref[i] - 1, 0) // block)
        return i, needed

    def keys(*args):
        i, needed = place(*args)
        return i, 0, 0, needed

    def values(*args):
        i, needed = place(*args)
        return i, 0, needed, 0

    def row(i, j, *_):
        return i, 0, 0, 0

    shapes = [(h, jnp.float32), (LANES, jnp.float32), (LANES, jnp.float32)]
    out, largest, total = pl.pallas_call(
        partial(_kernel, block=block, scale=h**-0.5, precision=matmul_precision(q_bkrh.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, length // block),
            in_specs=[
                pl.BlockSpec((None, k, r, h), row),
                pl.BlockSpec((None, k, h, block), keys),
                pl.BlockSpec((None, k, block, h), values),
            ],
            out_specs=[pl.BlockSpec((None, k, r, width), row) for width, _ in shapes],
        ),
        out_shape=[jax.ShapeDtypeStruct((b, k, r, width), dtype) for width, dtype in shapes],
        cost_estimate=pl.CostEstimate(
            flops=4 * b * k * r * h * length,
            bytes_accessed=k_bkhs.size * k_bkhs.dtype.itemsize * 2,
            transcendentals=b * k * r * length,
        ),
        interpret=interpret,
    )(first_b.astype(jnp.int32), end_b.astype(jnp.int32), q_bkrh, k_bkhs, v_bksh)
    return out, largest[..., 0], total[..., 0]


def _kernel(
    first_ref,
    end_ref,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    largest_ref,
    total_ref,
    *,
    block,
    scale,
    precision,
):
    """A block of positions of one row, all its heads."""
    i, j = pl.program_id(0), pl.program_id(1)
    first, end = first_ref[i], end_ref[i]
    dot = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    product = (((1,), (0,)), ((), ()))

    @pl.when(j == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        largest_ref[...] = jnp.full_like(largest_ref, -1e30)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when((j * block < end) & ((j + 1) * block > first))
    def _():
        for head in range(k_ref.shape[0]):
            scores_rs = dot(q_ref[head], k_ref[head], product) * scale
            position_rs = j * block + jax.lax.broadcasted_iota(jnp.int32, scores_rs.shape, 1)
            seen_rs = (position_rs >= first) & (position_rs < end)
            scores_rs = jnp.where(seen_rs, scores_rs, -1e30)
            before_r1 = largest_ref[head, :, :1]
            largest_r1 = jnp.maximum(before_r1, jnp.max(scores_rs, axis=1, keepdims=True))
            weights_rs = jnp.where(seen_rs, jnp.exp(scores_rs - largest_r1), 0.0)
            kept_r1 = jnp.exp(before_r1 - largest_r1)
            total_r1 = kept_r1 * total_ref[head, :, :1] + jnp.sum(weights_rs, 1, keepdims=True)
            new_rh = dot(weights_rs.astype(v_ref.dtype), v_ref[head], product)
            out_ref[head] = kept_r1 * out_ref[head] + new_rh
            largest_ref[head] = jnp.broadcast_to(largest_r1, largest_ref.shape[1:])
            total_ref[head] = jnp.broadcast_to(total_r1, total_ref.shape[1:])
