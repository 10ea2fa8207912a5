"""Grouped-query attention, one function for training, prefill and decoding.

Axis letters: b batch, t query position, s key position, n query head, k key/value head,
g query heads of one key head (n = k·g), h head width.
"""

import jax
import jax.numpy as jnp


def visible(
    query_positions_bt: jax.Array,
    key_positions_bs: jax.Array,
    allowed_bts: jax.Array | None,
    sliding_window: int | None,
) -> jax.Array:
    """Which keys a query sees, bool [b, t, s]: allowed ones at or before it, within the window.

    A window of w counts the query itself, as transformers' sliding_window_overlay does: the
    oldest visible key is w - 1 positions back. allowed_bts: bool, may be [b, 1, s]; None: all.
    """
    distance_bts = query_positions_bt[:, :, None] - key_positions_bs[:, None, :]
    seen_bts = distance_bts >= 0
    if sliding_window is not None:
        seen_bts &= distance_bts < sliding_window
    if allowed_bts is not None:
        seen_bts &= allowed_bts
    return seen_bts


def same_sequence(sequences_bt: jax.Array, branches_bt: jax.Array) -> jax.Array:
    """Which tokens of a packed row belong together, bool [b, t, t]: of one sequence, and either of
    one branch or the key in the prompt, branch 0 (see model/packing.py)."""
    same_bts = sequences_bt[:, :, None] == sequences_bt[:, None, :]
    branch_bts = branches_bt[:, None, :]
    return same_bts & ((branch_bts == 0) | (branch_bts == branches_bt[:, :, None]))


def attention(
    q_btnh: jax.Array, k_bkhs: jax.Array, v_bksh: jax.Array, seen_bts: jax.Array
) -> jax.Array:
    """softmax(q·k / √h)·v over the keys that `seen_bts` allows; [b, t, n, h] in q's dtype.

    Keys lie [h, s] and values [s, h], as the decode cache keeps them: with one query a row both
    products then run along contiguous memory (on CPU a third of the time of the other layouts).
    Scores and softmax are fp32. A query that sees nothing gets the mean of all values, a padded
    row's harmless answer, and never NaN.
    """
    b, t, n, h = q_btnh.shape
    k, s = k_bkhs.shape[1], k_bkhs.shape[-1]
    g = n // k
    product = _product_of_few_rows if t == 1 else _product
    # All queries of a key head as the rows of one matrix: on CPU two to three times as fast as a
    # product over separate axes t and g.
    q_bkrh = jnp.transpose(q_btnh.reshape(b, t, k, g, h), (0, 2, 3, 1, 4)).reshape(b, k, g * t, h)
    scores_bkrs = product(q_bkrh, k_bkhs)
    hidden_bts = jnp.where(seen_bts, 0.0, -1e30)
    scores = scores_bkrs.reshape(b, k, g, t, s) * h**-0.5 + hidden_bts[:, None, None]
    # Softmax whose division comes last, over h numbers a query instead of s.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1)[..., None]
    weights_bkrs = weights.reshape(b, k, g * t, s).astype(q_btnh.dtype)
    out_bkrh = product(weights_bkrs, v_bksh)
    out = (out_bkrh.reshape(b, k, g, t, h) / total).astype(q_btnh.dtype)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(b, t, n, h)


def _product(a_bkrx: jax.Array, b_bkxy: jax.Array) -> jax.Array:
    """The matrix product of each row and head, in fp32: [b, k, r, y]."""
    return jnp.einsum(
        "bkrx,bkxy->bkry", a_bkrx, b_bkxy, precision=matmul_precision(a_bkrx.dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _product_of_few_rows(a_bkrx: jax.Array, b_bkxy: jax.Array) -> jax.Array:
    """As `_product`. With a few rows XLA's CPU product spends half its time on copying the other
    matrix into its own layout; multiplying and summing reads it where it lies."""

    def sums(a_bkrx, b_bkxy):
        a_bkrx1 = a_bkrx[..., None].astype(jnp.float32)
        return jnp.sum(a_bkrx1 * b_bkxy[:, :, None].astype(jnp.float32), axis=3)

    return jax.lax.platform_dependent(a_bkrx, b_bkxy, cpu=sums, default=_product)


def matmul_precision(dtype):
    """fp32 means fp32: accelerators would otherwise round its products' inputs to bf16 or tf32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
