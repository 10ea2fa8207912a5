"""Grouped-query attention, one function for training, prefill and decoding.

Axis letters: b batch, t query position, s key position, n query head, k key/value head,
g query heads of one key head (n = k·g), h head width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.precision import product


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


def attention(
    q_btnh: jax.Array, k_bkhs: jax.Array, v_bksh: jax.Array, seen_bts: jax.Array
) -> jax.Array:
    """softmax(q·k / √h)·v over the keys that `seen_bts` allows; [b, t, n, h] in q's dtype.

    With one query per row, the keys are a decode cache. With more, they are the queries' own keys,
    and no query may see a key behind it in the row: such keys are not read.

    Keys lie [h, s] and values [s, h], as in the decode cache: with one query per row both products
    then run along contiguous memory (on CPU in a third of the time of other layouts). Scores and
    softmax are fp32. A query that sees nothing (padding) gets a mean of values, never NaN.
    """
    b, t, n, h = q_btnh.shape
    k = k_bkhs.shape[1]
    # All queries of a key head are the rows of one matrix: on CPU two to three times as fast as a
    # product over separate axes t and g.
    q_bkgth = jnp.transpose(q_btnh.reshape(b, t, k, n // k, h), (0, 2, 3, 1, 4))
    if t == 1:
        out_bkgth, _ = _attend(q_bkgth, k_bkhs, v_bksh, seen_bts, _product_of_few_rows)
    else:
        out_bkgth = _blockwise(q_bkgth, k_bkhs, v_bksh, seen_bts)
    return jnp.transpose(out_bkgth, (0, 3, 1, 2, 4)).reshape(b, t, n, h)


def decode_attention(q_btnh: jax.Array, cached: Callable, recent: tuple) -> jax.Array:
    """As `attention`, of one query per row, over keys that lie in two places. `cached(q_bkrh)`
    gives (Σ weights·v, largest score, Σ weights) of the cached ones, as attention_tpu.attention;
    `recent` is (k_bkhs, v_bksh, seen_bts) of the others, of which each query sees one at least."""
    b, t, n, h = q_btnh.shape
    k_bkhs, v_bksh, seen_bts = recent
    q_bkgth = jnp.transpose(q_btnh.reshape(b, t, k_bkhs.shape[1], -1, h), (0, 2, 3, 1, 4))
    out_bkrh, largest_bkr, total_bkr = cached(q_bkgth[..., 0, :])
    scores_bkrs = _scores(q_bkgth, k_bkhs, seen_bts, _product)[..., 0, :]
    both_bkr = jnp.maximum(largest_bkr, jnp.max(scores_bkrs, axis=-1))
    weights_bkrs = jnp.exp(scores_bkrs - both_bkr[..., None])
    kept_bkr = jnp.exp(largest_bkr - both_bkr)
    total_bkr = kept_bkr * total_bkr + jnp.sum(weights_bkrs, axis=-1)
    new_bkrh = _product(weights_bkrs.astype(q_btnh.dtype), v_bksh)
    out_bkrh = (kept_bkr[..., None] * out_bkrh + new_bkrh) / total_bkr[..., None]
    return out_bkrh.astype(q_btnh.dtype).reshape(b, t, n, h)


def _scores(q_bkgth, k_bkhs, seen_bts, product) -> jax.Array:
    b, k, g, t, h = q_bkgth.shape
    scores_bkrs = product(q_bkgth.reshape(b, k, g * t, h), k_bkhs)
    hidden_bts = jnp.where(seen_bts, 0.0, -1e30)
    return scores_bkrs.reshape(b, k, g, t, -1) * h**-0.5 + hidden_bts[:, None, None]


def _attend(q_bkgth, k_bkhs, v_bksh, seen_bts, product):
    """(softmax(scores)·v in q's dtype, the log of each softmax's denominator, fp32 [b, k, g, t])"""
    b, k, g, t, h = q_bkgth.shape
    scores = _scores(q_bkgth, k_bkhs, seen_bts, product)
    # The softmax's division comes last, over h numbers per query instead of s.
    largest_bkgt = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - largest_bkgt[..., None])
    total_bkgt = jnp.sum(weights, axis=-1)
    weights_bkrs = weights.reshape(b, k, g * t, -1).astype(q_bkgth.dtype)
    out_bkgth = product(weights_bkrs, v_bksh).reshape(b, k, g, t, h) / total_bkgt[..., None]
    return out_bkgth.astype(q_bkgth.dtype), largest_bkgt + jnp.log(total_bkgt)


def _blocks(t: int) -> list[slice]:
    """The queries in at most eight blocks. Keys behind a block's end are not read, and a block's
    scores about fit into a CPU's cache."""
    size = max(128, -(-t // 8))
    return [slice(start, min(start + size, t)) for start in range(0, t, size)]


@jax.custom_vjp
def _blockwise(q_bkgth, k_bkhs, v_bksh, seen_bts):
    """Attention block by block of queries. The backward pass computes the weights again from the
    softmax's denominator instead of keeping them (Dao et al. 2022, Algorithm 4)."""
    return _blockwise_fwd(q_bkgth, k_bkhs, v_bksh, seen_bts)[0]


def _blockwise_fwd(q_bkgth, k_bkhs, v_bksh, seen_bts):
    blocks = [
        _attend(
            q_bkgth[..., now, :],
            k_bkhs[..., : now.stop],
            v_bksh[:, :, : now.stop],
            seen_bts[:, now, : now.stop],
            _product,
        )
        for now in _blocks(q_bkgth.shape[3])
    ]
    # Named as the products are named: remat keeps these whenever it keeps those.
    out_bkgth = checkpoint_name(jnp.concatenate([out for out, _ in blocks], axis=3), "product")
    logsum_bkgt = checkpoint_name(jnp.concatenate([x for _, x in blocks], axis=3), "product")
    return out_bkgth, (q_bkgth, k_bkhs, v_bksh, seen_bts, out_bkgth, logsum_bkgt)


def _blockwise_bwd(kept, grad_bkgth):
    q_bkgth, k_bkhs, v_bksh, seen_bts, out_bkgth, logsum_bkgt = kept
    b, k, _, t, h = q_bkgth.shape
    dtype = q_bkgth.dtype
    grad_q, grad_k_bkhs, grad_v_bkhs = [], None, None
    for now in reversed(_blocks(t)):  # the last block's keys are all keys
        q, grad, out = (x[..., now, :] for x in (q_bkgth, grad_bkgth, out_bkgth))
        keys_bkhs, values_bksh = k_bkhs[..., : now.stop], v_bksh[:, :, : now.stop]
        scores = _scores(q, keys_bkhs, seen_bts[:, now, : now.stop], _product)
        weights = jnp.exp(scores - logsum_bkgt[..., now, None])

        def rows(x):
            return x.reshape(b, k, -1, x.shape[-1]).astype(dtype)

        grad_weights = _product(rows(grad), jnp.swapaxes(values_bksh, 2, 3)).reshape(weights.shape)
        both = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
        grad_scores = rows(weights * (grad_weights - both) * h**-0.5)
        grad_q.append(_product(grad_scores, jnp.swapaxes(keys_bkhs, 2, 3)).reshape(q.shape))
        # The narrow operand comes first: XLA's CPU compiler transposes the first one.
        grad_k_bkhs = _add_front(grad_k_bkhs, _product(jnp.swapaxes(rows(q), 2, 3), grad_scores))
        grad_v_bkhs = _add_front(
            grad_v_bkhs, _product(jnp.swapaxes(rows(grad), 2, 3), rows(weights))
        )
    return (
        jnp.concatenate(grad_q[::-1], axis=3).astype(dtype),
        grad_k_bkhs.astype(dtype),
        jnp.swapaxes(grad_v_bkhs, 2, 3).astype(dtype),
        None,
    )


def _add_front(total_bkhs, new_bkhs):
    """The sum in place, where `new` has only the first keys. (XLA would fuse a sum of padded arrays
    with the work after it, which reads each of them key by key.)"""
    if total_bkhs is None:
        return new_bkhs
    front = total_bkhs[..., : new_bkhs.shape[-1]] + new_bkhs
    return jax.lax.dynamic_update_slice(total_bkhs, front, (0, 0, 0, 0))


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


# ----------------------------------------------------------------------------- products


def _product(a_bkrx: jax.Array, b_bkxy: jax.Array) -> jax.Array:
    """The matrix product of each row and head, in fp32: [b, k, r, y]."""
    return product("bkrx,bkxy->bkry", a_bkrx, b_bkxy, a_bkrx.dtype)


def _product_of_few_rows(a_bkrx: jax.Array, b_bkxy: jax.Array) -> jax.Array:
    """As `_product`. For few rows, XLA's CPU product spends half its time on copying the other
    matrix into its own layout; multiplying and summing reads the matrix where it lies."""

    def sums(a_bkrx, b_bkxy):
        a_bkrx1 = a_bkrx[..., None].astype(jnp.float32)
        return jnp.sum(a_bkrx1 * b_bkxy[:, :, None].astype(jnp.float32), axis=3)

    return jax.lax.platform_dependent(a_bkrx, b_bkxy, cpu=sums, default=_product)
