"""Drawing the next token: temperature, top-k, top-p, min-p, each answer with settings of its own.

The settings are arrays with one value per row, so that answers with other settings share a batch
and compile nothing anew. All three filters are thresholds: a token stays if its weight is at least
the row's threshold. A filter that no row uses costs nothing.

Randomness is a function of (seed, prompt_id, answer index, token position) alone.

Axis letters: b row, v vocabulary, k place among a row's largest weights.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

HEAD = 128  # the largest weights of a row, among which nearly every threshold lies
SETTINGS = {"temperature": np.float32, "top_p": np.float32, "top_k": np.int32, "min_p": np.float32}


def draw(logits_bv: jax.Array, uniform_b: jax.Array, settings: dict[str, jax.Array]):
    """One token per row by inverse CDF: (tokens int32 [b], their unfiltered log-probs fp32 [b]).

    logits_bv: fp32; uniform_b: fp32 in [0, 1); settings: an array [b] for each of SETTINGS.
    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave every token. Filters in
    transformers' order: temperature, top-k, top-p, min-p (generation/logits_process.py).
    """

    def likeliest():
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)

    def drawn():
        return _inverse_cdf(filtered_weights(logits_bv, settings), uniform_b)

    def nothing():
        return jnp.zeros(logits_bv.shape[0], jnp.int32)

    with jax.named_scope("draw"):
        greedy_b = settings["temperature"] == 0
        tokens_b = jnp.where(
            greedy_b,
            jax.lax.cond(jnp.any(greedy_b), likeliest, nothing),
            jax.lax.cond(jnp.all(greedy_b), nothing, drawn),
        )
        chosen_b = jnp.take_along_axis(logits_bv, tokens_b[:, None], axis=-1)[:, 0]
        return tokens_b, chosen_b - jax.nn.logsumexp(logits_bv, axis=-1)


def filtered_weights(logits_bv: jax.Array, settings: dict[str, jax.Array]) -> jax.Array:
    """Unnormalised probabilities [b, v]: 1 at the likeliest token, 0 where filtered out."""
    temperature_b, top_k_b, top_p_b = (settings[x] for x in ("temperature", "top_k", "top_p"))
    scaled_bv = logits_bv / jnp.where(temperature_b == 0, 1.0, temperature_b)[:, None]
    weights_bv = jnp.exp(scaled_bv - jnp.max(scaled_bv, axis=-1, keepdims=True))
    threshold_b = jax.lax.cond(
        jnp.any((top_k_b > 0) | (top_p_b < 1)),
        lambda: _threshold(weights_bv, top_k_b, top_p_b),
        lambda: jnp.zeros_like(temperature_b),
    )
    # min_p is a share of the likeliest token's probability, whose weight is 1.
    threshold_b = jnp.maximum(threshold_b, settings["min_p"])
    return jnp.where(weights_bv >= threshold_b[:, None], weights_bv, 0.0)


def _threshold(weights_bv, top_k_b, top_p_b) -> jax.Array:
    """The smallest weight of each row that top-k, and then top-p, keep. Equal weights are kept or
    dropped together.

    In most rows it is among the HEAD largest; in the others bisection finds it. Both are exact, and
    cost a fraction of sorting the vocabulary.
    """
    b, v = weights_bv.shape
    head_bk = jax.lax.top_k(weights_bv, min(HEAD, v))[0]
    top_k_b = jnp.where((top_k_b > 0) & (top_k_b < v), top_k_b, 0)
    in_head_b = jnp.minimum(jnp.maximum(top_k_b, 1), head_bk.shape[1]) - 1
    kth_b = jnp.take_along_axis(head_bk, in_head_b[:, None], axis=-1)[:, 0]
    kth_b = jax.lax.cond(
        jnp.any(top_k_b > HEAD),
        lambda: jnp.where(top_k_b > HEAD, _bisect_top_k(weights_bv, top_k_b), kth_b),
        lambda: kth_b,
    )
    kth_b = jnp.where(top_k_b > 0, kth_b, 0.0)

    # top-p keeps a token if all likelier ones together have less than top_p of what top-k left.
    kept_bv = jnp.where(weights_bv >= kth_b[:, None], weights_bv, 0.0)
    limit_b = top_p_b * jnp.sum(kept_bv, axis=-1)
    head_bk = jnp.where(head_bk >= kth_b[:, None], head_bk, 0.0)
    above_bk = jnp.cumsum(head_bk, axis=-1) - head_bk
    smallest_b = jnp.min(jnp.where(above_bk < limit_b[:, None], head_bk, jnp.inf), axis=-1)
    open_b = (top_p_b < 1) & (above_bk[:, -1] < limit_b) & (head_bk[:, -1] > 0)

    def bisect(carry):  # a few rows at a time
        open_b, smallest_b = carry
        rows = jnp.nonzero(open_b, size=min(8, b), fill_value=b)[0]  # b: no row
        of_rows = weights_bv.at[rows].get(mode="clip"), kth_b.at[rows].get(mode="clip")
        kept = jnp.where(of_rows[0] >= of_rows[1][:, None], of_rows[0], 0.0)
        smallest = _bisect_top_p(kept, limit_b.at[rows].get(mode="clip"))
        smallest_b = smallest_b.at[rows].set(smallest, mode="drop")
        return open_b.at[rows].set(False, mode="drop"), smallest_b

    _, smallest_b = jax.lax.while_loop(lambda c: jnp.any(c[0]), bisect, (open_b, smallest_b))
    return jnp.maximum(kth_b, jnp.where(top_p_b < 1, smallest_b, 0.0))


def _bisect_top_p(weights_bv: jax.Array, limit_b: jax.Array) -> jax.Array:
    """The smallest weight for which all larger weights sum to less than the limit."""

    def is_kept(bits_bv, middle_b):
        above_bv = jnp.where(bits_bv > middle_b[:, None], weights_bv, 0.0)
        return jnp.sum(above_bv, axis=-1) < limit_b

    return _bisect(weights_bv, is_kept)


def _bisect_top_k(weights_bv: jax.Array, top_k_b: jax.Array) -> jax.Array:
    """The k-th largest weight."""

    def is_kept(bits_bv, middle_b):
        return jnp.sum(bits_bv > middle_b[:, None], axis=-1) < top_k_b

    return _bisect(weights_bv, is_kept)


def _bisect(weights_bv: jax.Array, is_kept) -> jax.Array:
    """The smallest weight of each row for which `is_kept(bits of all, bits of it)`, which holds for
    all larger ones too. Over the bits: non-negative floats are ordered as their bits are."""
    bits_bv = jax.lax.bitcast_convert_type(weights_bv, jnp.int32)

    def halve(_, bounds):  # high is kept, low is not (or low is -1)
        low_b, high_b = bounds
        middle_b = low_b + (high_b - low_b) // 2
        kept_b = is_kept(bits_bv, middle_b)
        return jnp.where(kept_b, low_b, middle_b), jnp.where(kept_b, middle_b, high_b)

    top_b = jnp.max(bits_bv, axis=-1)
    _, high_b = jax.lax.fori_loop(0, 31, halve, (jnp.full_like(top_b, -1), top_b))
    return jax.lax.bitcast_convert_type(high_b, jnp.float32)


def _inverse_cdf(weights_bv: jax.Array, uniform_b: jax.Array, block: int = 256) -> jax.Array:
    """The token at which the running sum of the weights passes uniform · total.

    In two levels, first over the sums of blocks, then within one block: five times faster on CPU
    than one cumsum over the vocabulary, and more exact.
    """
    b, v = weights_bv.shape
    weights_bv = jnp.pad(weights_bv, ((0, 0), (0, -v % block)))
    blocks_bij = weights_bv.reshape(b, -1, block)
    sums_bi = jnp.cumsum(jnp.sum(blocks_bij, axis=-1), axis=-1)
    target_b1 = uniform_b[:, None] * sums_bi[:, -1:]
    i_b = _first_above(sums_bi, target_b1)
    before_b1 = jnp.where(
        i_b[:, None] > 0, jnp.take_along_axis(sums_bi, jnp.maximum(i_b - 1, 0)[:, None], 1), 0.0
    )
    within_bj = jnp.take_along_axis(blocks_bij, i_b[:, None, None], axis=1)[:, 0]
    j_b = _first_above(jnp.cumsum(within_bj, axis=-1), target_b1 - before_b1)
    return (i_b * block + j_b).astype(jnp.int32)


def _first_above(sums_bi: jax.Array, target_b1: jax.Array) -> jax.Array:
    """The first index whose running sum exceeds the target. If rounding leaves none: the last index
    that added anything, so that a filtered token is never drawn."""
    index_b = jnp.sum(sums_bi <= target_b1, axis=-1)
    last_b = jnp.sum(sums_bi < sums_bi[:, -1:], axis=-1)
    return jnp.minimum(index_b, last_b)


# ------------------------------------------------------------------------ random numbers


def answer_key(seed: int, prompt_id: str, index: int) -> np.ndarray:
    """The key of one answer's random numbers: uint32 [2]."""
    digest = hashlib.sha256(f"{seed}\n{index}\n{prompt_id}".encode("utf-8", "surrogatepass"))
    return np.frombuffer(digest.digest()[:8], np.uint32)


def uniforms(keys_b2: jax.Array, positions_b: jax.Array) -> jax.Array:
    """One uniform number in [0, 1) for each answer's key and token position."""

    def one(key_2, position):
        key = jax.random.wrap_key_data(key_2, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(one)(keys_b2, positions_b)
