"""Log-probabilities of responses. The logits of a whole batch are never held at once.

Axis letters: b row, t index in a row, s index in a chunk of a row, n response, d width,
v vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp

from model import decoder
from model.config import DecoderConfig
from model.forward import Remat, forward
from model.precision import FLOAT32, Precision, product
from sharding.mesh import batch_shards, constrain

CHUNK = 256  # tokens per device whose logits are held: 50 MB of fp32 at 49,152 words
ACCELERATOR_CHUNK = 1024  # elsewhere than on CPU: devices sum the vocabulary's gradient per chunk
# Kept log-probs of a reference are named by it (stages/dpo.py). Raise it with each change to this
# file, to the decoder, its forward pass or packing that moves the numbers by more than rounding.
VERSION = 2


def response_logprobs(
    params: decoder.Params,
    config: DecoderConfig,
    batch: dict[str, jax.Array],
    responses: int,
    precision: Precision = FLOAT32,
    remat: Remat = "none",
) -> jax.Array:
    """log π(response | prompt), summed over tokens, fp32 [responses]; 0 for a response that the
    batch does not have.

    batch: the arrays of model/packing.py. The vocabulary product is computed for response tokens
    only. Sums, not means, as in Rafailov et al. 2023.
    """
    hidden_btd = forward(params, config, batch, precision, remat)
    hidden_btd = jnp.take_along_axis(hidden_btd, batch["predictors"][..., None], axis=1)
    hidden_btd = constrain(hidden_btd, "batch", "length", "act_embed")
    longest = jnp.max(jnp.sum(batch["owners"] >= 0, axis=1))
    logprobs_bt = token_logprobs(
        params, config, hidden_btd, batch["targets"], longest, precision.operands
    )
    # A masked sum and not a scatter, which would give other bits from run to run on a GPU.
    mine_btn = batch["owners"][..., None] == jnp.arange(responses)
    return jnp.sum(jnp.where(mine_btn, logprobs_bt[..., None], 0.0), axis=(0, 1))


def chunk_length(rows: int, length: int, mesh) -> int:
    """Tokens of each row in a chunk, for a batch of `rows` rows of `length` tokens on this mesh."""
    device = mesh.abstract_device  # None: a mesh without devices
    on_cpu = mesh.empty or (device is not None and device.device_kind == "cpu")
    tokens = (CHUNK if on_cpu else ACCELERATOR_CHUNK) * batch_shards(mesh)
    return min(length, max(1, tokens // rows))


def token_logprobs(
    params, config, hidden_btd, targets_bt, longest, operands=jnp.float32
) -> jax.Array:
    """log softmax of the logits at the targets, fp32 [b, t]. Only the first `longest` tokens (an
    int32) of each row are sure to be computed; values behind them may be 0.

    The tokens are taken in chunks. The backward pass computes each chunk's logits again, so that
    memory holds the logits of one chunk only, at the price of one more vocabulary product.
    """
    b, t, _ = hidden_btd.shape
    step = chunk_length(b, t, jax.sharding.get_abstract_mesh())
    behind = -t % step
    hidden_btd = jnp.pad(hidden_btd, ((0, 0), (0, behind), (0, 0)))
    targets_bt = jnp.pad(targets_bt, ((0, 0), (0, behind)))
    w_dv = params["embed"].T if config.tie_word_embeddings else params["unembed"]
    return _chunked(step, operands, w_dv, hidden_btd, targets_bt, -(-longest // step))[:, :t]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(step: int, operands, w_dv, hidden_btd, targets_bt, chunks):
    return _chunked_fwd(step, operands, w_dv, hidden_btd, targets_bt, chunks)[0]


def _chunked_fwd(step, operands, w32_dv, hidden_btd, targets_bt, chunks):
    w_dv = _gathered(w32_dv, operands)

    def one_chunk(i, found):
        logits_bsv = _logits(w_dv, _chunk(hidden_btd, i, step))
        targets_bs = _chunk(targets_bt, i, step)
        chosen_bs = jnp.take_along_axis(logits_bsv, targets_bs[..., None], axis=-1)[..., 0]
        logsum_bs = jax.nn.logsumexp(logits_bsv, axis=-1)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all_bt, new_bs, i * step, 1)
            for all_bt, new_bs in zip(found, (chosen_bs - logsum_bs, logsum_bs))
        )

    nothing_bt = jnp.zeros(targets_bt.shape, jnp.float32)
    logprobs_bt, logsum_bt = jax.lax.fori_loop(0, chunks, one_chunk, (nothing_bt, nothing_bt))
    return logprobs_bt, (w32_dv, hidden_btd, targets_bt, chunks, logsum_bt)


def _chunked_bwd(step, operands, kept, grad_bt):
    w32_dv, hidden_btd, targets_bt, chunks, logsum_bt = kept
    dtype, words = hidden_btd.dtype, jnp.arange(w32_dv.shape[1])
    w_dv = _gathered(w32_dv, operands)

    def one_chunk(i, found):
        grad_w_dv, grad_hidden_btd = found
        hidden_bsd = _chunk(hidden_btd, i, step)
        softmax_bsv = jnp.exp(_logits(w_dv, hidden_bsd) - _chunk(logsum_bt, i, step)[..., None])
        is_target_bsv = _chunk(targets_bt, i, step)[..., None] == words
        grad_bsv = _chunk(grad_bt, i, step)[..., None] * (is_target_bsv - softmax_bsv)
        grad_bsv = constrain(grad_bsv.astype(operands), "batch", "length", "vocab")
        grad_hidden_bsd = product("bsv,dv->bsd", grad_bsv, w_dv, operands)
        return (
            grad_w_dv + product("bsd,bsv->dv", hidden_bsd, grad_bsv, operands),
            jax.lax.dynamic_update_slice_in_dim(
                grad_hidden_btd, grad_hidden_bsd.astype(dtype), i * step, 1
            ),
        )

    nothing = jnp.zeros(w_dv.shape, jnp.float32), jnp.zeros_like(hidden_btd)
    grad_w_dv, grad_hidden_btd = jax.lax.fori_loop(0, chunks, one_chunk, nothing)
    return grad_w_dv, grad_hidden_btd, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _gathered(w32_dv, dtype) -> jax.Array:
    """The matrix in the dtype of computation, cut along the vocabulary only. Called once, so that
    its shards are not collected again for each chunk."""
    return constrain(w32_dv.astype(dtype), "act_embed", "vocab")


def _chunk(x_bt: jax.Array, i, step: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_bt, i * step, step, 1)


def _logits(w_dv, hidden_bsd) -> jax.Array:
    logits_bsv = product("bsd,dv->bsv", hidden_bsd, w_dv, w_dv.dtype)
    return constrain(logits_bsv, "batch", "length", "vocab")
