"""Disentangled attention on a TPU, in one kernel: the arrays of all queries times all keys stay in
the chip's own memory (VMEM).

The scores of content to content are a product. The scores of content to position and of position to
content are look-ups, element by element: B(q − k) for each query q and key k (deberta.py). A TPU is
slow at that, so here they are products too. The tables of positions are laid out by distance, which
makes a query's scores for all distances one row. A single instruction (a roll with a stride) then
moves each row to where its keys are, one place further than the row before it.

Axis letters as in model/rankers/deberta.py; r row of a block, c column of its scores by distance.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.precision import matmul_precision

BLOCK = 128  # queries at a time, and keys in position to content: the width of a vector register
LONGEST = 2048  # tokens; VMEM holds a head's keys, values and tables of such a sequence


def runs_on(device_kind: str) -> bool:
    """Whether a device of this kind (jax.Device.device_kind) has that roll, as TPUs from v5 do."""
    version = re.match(r"TPU ?v?(\d+)", device_kind)
    return version is not None and int(version[1]) >= 5


def takes(length: int) -> bool:
    """Whether the kernel is built for sequences of this padded length."""
    return length % BLOCK == 0 and length <= LONGEST


def attention(
    q_nbth, k_nbhs, v_nbsh, position_k_nhp, position_q_nph, rows, real_bs, interpret: bool = False
):
    """deberta.attention of every token for every token, [n, b, t, h]; `takes(t)` must hold. rows:
    B(δ) for δ = −(t−1) … t−1, a numpy array. interpret: run the kernel step by step, on any device.
    """
    n, b, t, h = q_nbth.shape
    x = np.arange(2 * t)  # rows of the tables by distance

    def rows_of(distances):
        return rows[np.clip(distances, -(t - 1), t - 1) + t - 1]

    whole = pl.BlockSpec((None, None, t, h), lambda n, b, i: (n, b, 0, 0))
    block = pl.BlockSpec((None, None, BLOCK, h), lambda n, b, i: (n, b, i, 0))
    table = pl.BlockSpec((None, 2 * t, h), lambda n, b, i: (n, 0, 0))
    scale = float((3 * h) ** -0.5)
    return pl.pallas_call(
        partial(_kernel, scale=scale, precision=matmul_precision(q_nbth.dtype)),
        grid=(n, b, t // BLOCK),
        in_specs=[
            block,
            whole,
            whole,
            table,
            table,
            pl.BlockSpec((None, 1, t), lambda n, b, i: (b, 0, 0)),
        ],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(q_nbth.shape, q_nbth.dtype),
        scratch_shapes=[pltpu.VMEM((BLOCK, t), jnp.float32)],
        interpret=interpret,
    )(
        q_nbth,
        jnp.swapaxes(k_nbhs, 2, 3),
        v_nbsh,
        jnp.swapaxes(position_k_nhp, 1, 2)[:, rows_of(t - 1 - x)],
        position_q_nph[:, rows_of(x - t + 1)],
        real_bs.astype(jnp.int32)[:, None],
    )


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    position_k_ref,
    position_q_ref,
    real_ref,
    out_ref,
    scores_ref,
    *,
    scale: float,
    precision,
):
    """A block of queries of one head of one sequence. Row x of position_k belongs to the distance
    q − k = t − 1 − x, row x of position_q to x − t + 1."""
    blocks, i = k_ref.shape[0] // BLOCK, pl.program_id(2)
    dot = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    rows_by_rows = (((1,), (1,)), ((), ()))

    def positions(x_rh, table_ref, window: int | jax.Array, width: int):
        """[r, width]: row r of a block times the table's rows from BLOCK · (window + 1) − 1 − r."""
        start = pl.multiple_of(window * BLOCK, BLOCK)
        scores_rc = dot(x_rh, table_ref[pl.ds(start, BLOCK + width), :], rows_by_rows)
        # Row r moves by r + 1 to the right.
        return pltpu.roll(scores_rc, 1, 1, stride=1, stride_axis=0)[:, BLOCK:]

    q_th = q_ref[...]
    c2p_ts = positions(q_th, position_k_ref, blocks - 1 - i, k_ref.shape[0])
    scores_ref[...] = dot(q_th, k_ref[...], rows_by_rows) + c2p_ts

    @pl.loop(0, blocks)
    def _(j):
        keys = pl.ds(pl.multiple_of(j * BLOCK, BLOCK), BLOCK)
        p2c_st = positions(k_ref[keys, :], position_q_ref, blocks - 1 - j + i, BLOCK)
        scores_ref[:, keys] += p2c_st.T

    scores_ts = jnp.where(real_ref[...] > 0, scores_ref[...] * scale, -1e30)
    weights_ts = jnp.exp(scores_ts - jnp.max(scores_ts, axis=-1, keepdims=True))
    out_th = dot(weights_ts.astype(v_ref.dtype), v_ref[...], (((1,), (0,)), ((), ())))
    out_ref[...] = (out_th / jnp.sum(weights_ts, axis=-1, keepdims=True)).astype(out_ref.dtype)
