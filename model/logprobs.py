"""Log-probabilities of responses, without ever holding the logits of a whole batch.

Axis letters: b row, t index in a row, r response token of a row, n response, d width,
v vocabulary.
"""

import jax
import jax.numpy as jnp

from model import mistral
from model.attention import same_sequence
from model.config import MistralConfig
from sharding.mesh import constrain

CHUNK = 512  # response tokens whose logits exist at a time: 100 MB of fp32 at 49,152 words


def response_logprobs(
    params: mistral.Params,
    config: MistralConfig,
    batch: dict[str, jax.Array],
    responses: int,
    dtype=jnp.float32,
    remat: mistral.Remat = "none",
) -> jax.Array:
    """Summed log π(response | prompt), fp32 [responses]; 0 for one that is not in the batch.

    batch: the arrays of model/packing.py. Only response tokens see the vocabulary product.
    Sums, no means (Rafailov et al. 2023).
    """
    allowed_bts = same_sequence(batch["sequences"], batch["branches"])
    hidden_btd = mistral.forward(
        params, config, batch["tokens"], batch["positions"], allowed_bts, dtype, remat
    )
    hidden_brd = jnp.take_along_axis(hidden_btd, batch["predictors"][..., None], axis=1)
    hidden_brd = constrain(hidden_brd, "batch", "length", "act_embed")
    logprobs_br = token_logprobs(params, config, hidden_brd, batch["targets"])
    # A masked sum, not a scatter: the same bits at every run on every device.
    mine_brn = batch["owners"][..., None] == jnp.arange(responses)
    return jnp.sum(jnp.where(mine_brn, logprobs_br[..., None], 0.0), axis=(0, 1))


def token_logprobs(params, config, hidden_brd, targets_br) -> jax.Array:
    """log softmax of the logits at the targets, fp32 [b, r].

    In chunks of positions, whose logits are computed again for the backward pass: memory is one
    chunk's logits, for one more vocabulary product.
    """
    b, r, d = hidden_brd.shape
    step = -(-r // -(-b * r // CHUNK))  # as few chunks as may be, of equal size
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
