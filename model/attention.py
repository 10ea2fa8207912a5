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
    k = k_bkhs.shape[1]
    precision = matmul_precision(q_btnh.dtype)
    # One token a row is its own case: an axis t of size 1 makes XLA's CPU compiler choose
    # transposed layouts and copy the cache (the decode step takes 1.5 times as long).
    r, seen = ("", seen_bts[:, None]) if t == 1 else ("t", seen_bts[:, None, None])
    q = q_btnh.reshape(b, k, n // k, h) if t == 1 else q_btnh.reshape(b, t, k, n // k, h)
    scores = jnp.einsum(
        f"b{r}kgh,bkhs->bkg{r}s", q, k_bkhs, precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    scores = jnp.where(seen, scores * h**-0.5, -1e30)
    probs = jax.nn.softmax(scores, axis=-1).astype(q_btnh.dtype)
    out = jnp.einsum(f"bkg{r}s,bksh->b{r}kgh", probs, v_bksh, precision=precision)
    return out.reshape(b, t, n, h)


def matmul_precision(dtype):
    """fp32 means fp32: accelerators would otherwise round its products' inputs to bf16 or tf32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
