"""Log-probabilities of responses, without ever holding the logits of a whole batch.

Axis letters: b sequence, t position, r response position, d width, v vocabulary.
"""

import jax
import jax.numpy as jnp

from model import mistral
from model.config import MistralConfig
from sharding.mesh import constrain

CHUNK = 512  # response tokens whose logits exist at a time: 100 MB of fp32 at 49,152 words


def response_logprobs(
    params: mistral.Params,
    config: MistralConfig,
    tokens_bt: jax.Array,
    starts_b: jax.Array,
    lengths_b: jax.Array,
    width: int,
    dtype=jnp.float32,
    remat: bool = False,
) -> jax.Array:
    """Summed log π(response | prompt) of each sequence, fp32 [b].

    tokens_bt: prompt and response, padded on the right; starts_b: the index at which the response
    starts (≥ 1); lengths_b: of the whole sequence; width: static, at least the longest response.
    Only response positions see the vocabulary product. Sums, no means (Rafailov et al. 2023).
    """
    t = tokens_bt.shape[1]
    valid_bt = jnp.arange(t) < lengths_b[:, None]
    hidden_btd = mistral.forward(params, config, tokens_bt, valid_bt, dtype, remat)

    # The token at index i is predicted at index i - 1.
    index_br = starts_b[:, None] + jnp.arange(width)
    counted_br = index_br < lengths_b[:, None]
    index_br = jnp.minimum(index_br, t - 1)
    hidden_brd = jnp.take_along_axis(hidden_btd, index_br[..., None] - 1, axis=1)
    hidden_brd = constrain(hidden_brd, "batch", "length", "act_embed")
    targets_br = jnp.take_along_axis(tokens_bt, index_br, axis=1)
    logprobs_br = token_logprobs(params, config, hidden_brd, targets_br)
    return jnp.sum(jnp.where(counted_br, logprobs_br, 0.0), axis=1)


def token_logprobs(params, config, hidden_brd, targets_br) -> jax.Array:
    """log softmax of the logits at the targets, fp32 [b, r].

    In chunks of positions, whose logits are computed again for the backward pass: memory is one
    chunk's logits, for one more vocabulary product.
    """
    b, r, d = hidden_brd.shape
    step = max(1, min(r, CHUNK // b))
    padding = -r % step
    hidden_brd = jnp.pad(hidden_brd, ((0, 0), (0, padding), (0, 0)))
    targets_br = jnp.pad(targets_br, ((0, 0), (0, padding)))
    hidden_cbsd = jnp.moveaxis(hidden_brd.reshape(b, -1, step, d), 1, 0)
    targets_cbs = jnp.moveaxis(targets_br.reshape(b, -1, step), 1, 0)

    @jax.checkpoint
    def one_chunk(hidden_bsd, targets_bs):
        logits_bsv = mistral.logits(params, config, hidden_bsd)
        logits_bsv = constrain(logits_bsv, "batch", "length", "vocab")
        chosen_bs = jnp.take_along_axis(logits_bsv, targets_bs[..., None], axis=-1)[..., 0]
        return chosen_bs - jax.nn.logsumexp(logits_bsv, axis=-1)

    logprobs_cbs = jax.lax.map(lambda chunk: one_chunk(*chunk), (hidden_cbsd, targets_cbs))
    return jnp.moveaxis(logprobs_cbs, 0, 1).reshape(b, -1)[:, :r]
