"""A KV cache on a TPU, in two kernels that touch only the blocks that they need.

`attention` is of one token per row: the blocks behind a row's last key, and before its sliding
window, are not fetched. Softmax in one pass, block by block with a running maximum (Dao et al.
2022, Algorithm 1). `merge` writes new keys and values at each row's own position, in place.

Keys and values lie as in model/kv_cache.py, so neither is transposed. interpret: run a kernel step
by step, on any device.

Axis letters: b row, k key/value head, r query head of a key head, h head width, s position, j index
among a row's new positions.
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
    positions: (0, -1e30, 0)."""
    b, k, r, h = q_bkrh.shape
    length = k_bkhs.shape[-1]
    # A row whose answer has ended may be longer than a cache that was cut since.
    end_b = jnp.minimum(end_b, length)
    block = _block(length, k * h * k_bkhs.dtype.itemsize)
    if not interpret:  # else the compiler may fetch all of the cache into the chip's own memory
        k_bkhs, v_bksh = (
            pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k_bkhs, v_bksh)
        )

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


def merge(k_bkhs, v_bksh, k_bkjh, v_bkjh, start_b, interpret: bool = False):
    """(k_bkhs, v_bksh) with the new keys and values [b, k, j, h], of the same dtype, at start_b,
    start_b + 1, … (int [b]) of each row; what falls beyond the cache is not written. In place,
    where the caller donates the cache. The cache's length is a multiple of LANES."""
    b, k, h, length = k_bkhs.shape
    steps = k_bkjh.shape[2]
    touched = -(-(steps - 1) // LANES) + 1  # blocks of LANES positions, wherever a row starts

    def place(i, j, start_ref):
        return jnp.minimum(start_ref[i] // LANES + j, length // LANES - 1)

    def keys(i, j, start_ref):
        return i, 0, 0, place(i, j, start_ref)

    def values(i, j, start_ref):
        return i, 0, place(i, j, start_ref), 0

    def row(i, j, _):
        return i, 0, 0, 0

    def kernel(start_ref, old_k, old_v, new_k, new_v, out_k, out_v):
        i, j = pl.program_id(0), pl.program_id(1)
        first = start_ref[i] - place(i, j, start_ref) * LANES
        # A product with 0 and 1 moves a row by its own distance, and is exact.
        index_js = jax.lax.broadcasted_iota(jnp.int32, (steps, LANES), 0)
        moves_js = jax.lax.broadcasted_iota(jnp.int32, (steps, LANES), 1) - first == index_js
        moves_js = moves_js.astype(jnp.float32).astype(old_k.dtype)
        dot = partial(
            jax.lax.dot_general,
            dimension_numbers=(((0,), (0,)), ((), ())),
            precision=matmul_precision(old_k.dtype),
            preferred_element_type=jnp.float32,
        )
        for old, out, axis in ((old_k, out_k, 1), (old_v, out_v, 0)):
            place_xy = jax.lax.broadcasted_iota(jnp.int32, old.shape[1:], axis) - first
            is_new_xy = (place_xy >= 0) & (place_xy < steps)
            for head in range(k):
                if axis == 1:
                    moved = dot(new_k[head], moves_js)
                else:
                    moved = dot(moves_js, new_v[head])
                out[head] = jnp.where(is_new_xy, moved.astype(old.dtype), old[head])

    of_keys = pl.BlockSpec((None, k, h, LANES), keys)
    of_values = pl.BlockSpec((None, k, LANES, h), values)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, touched),
            in_specs=[of_keys, of_values, *[pl.BlockSpec((None, k, steps, h), row)] * 2],
            out_specs=[of_keys, of_values],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_bkhs, v_bksh)],
        input_output_aliases={1: 0, 2: 1},  # counted with start_b
        cost_estimate=pl.CostEstimate(
            flops=4 * b * k * touched * LANES * steps * h,
            bytes_accessed=4 * b * k * touched * LANES * h * k_bkhs.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )(start_b.astype(jnp.int32), k_bkhs, v_bksh, k_bkjh, v_bkjh)
