"""The forward pass over packed rows, for training: a scan over the stacked layers.

Attention is computed in the unfolded rows of model/packing.py, and its output folded back.

Axis letters as in model/decoder.py, and of packed rows: u unfolded row, s position in it, c copy of
a token.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from model.attention import attention, visible
from model.config import DecoderConfig
from model.decoder import Params, block, cache_layout, embed, rms_norm, rope_angles
from model.precision import FLOAT32, Precision
from sharding.mesh import constrain

Remat = Literal["none", "full"]


def forward(
    params: Params,
    config: DecoderConfig,
    batch: dict[str, jax.Array],
    precision: Precision = FLOAT32,
    remat: Remat = "none",
) -> jax.Array:
    """Final hidden states [b, t, d] (after the last norm) of a batch: the arrays of
    model/packing.py.

    remat: what the backward pass computes again instead of keeping it. "none": only elementwise
    results, which are quicker to compute than to write and read; products and attention's output
    are kept. "full": everything but each layer's input, for a third more operations.
    """
    rope = rope_angles(batch["positions"], config.head_dim, config.rope_theta)
    places, seen_uss = (batch["unfold"], batch["copies"]), _same_segment(config, batch["segments"])

    def attend(q_btnh, k_btkh, v_btkh):
        unfolded = (unfold(x, *places) for x in (q_btnh, k_btkh, v_btkh))
        q, k, v = (constrain(x, "batch", "length", "heads", "head_dim") for x in unfolded)
        return fold(attention(q, *cache_layout(k, v), seen_uss), *places), None

    def body(x_btd, w):
        return block(w, config, x_btd, rope, attend, precision.operands)[0], None

    x_btd = embed(params, batch["tokens"], precision.activations)
    keep = {"none": jax.checkpoint_policies.save_only_these_names("product"), "full": None}
    # Within a scan nothing else could be merged with what is computed again.
    body = jax.checkpoint(body, policy=keep[remat], prevent_cse=False)
    x_btd, _ = jax.lax.scan(body, x_btd, params["layers"])
    return rms_norm(x_btd, params["final_norm"], config.rms_norm_eps)


def _same_segment(config: DecoderConfig, segments_bus: jax.Array) -> jax.Array:
    """Which tokens see which in the unfolded rows, bool [b·u, s, s]. Positions count through a row,
    since only the distance between two tokens of one text matters."""
    segments_us = segments_bus.reshape(-1, segments_bus.shape[-1])
    places_us = jnp.broadcast_to(jnp.arange(segments_us.shape[-1]), segments_us.shape)
    same_uss = segments_us[:, :, None] == segments_us[:, None, :]
    return visible(places_us, places_us, same_uss, config.sliding_window)


# --------------------------------------------------------------- rows folded and unfolded


@jax.custom_vjp
def unfold(x_bt: jax.Array, unfold_bus: jax.Array, copies_btc: jax.Array) -> jax.Array:
    """[b, t, …] → [b·u, s, …]: every token at all places where model/packing.py put a copy of it.

    The gradient looks a token's copies up and sums them: on CPU a scatter goes one by one.
    """
    b, u, s = unfold_bus.shape
    return _look_up(x_bt, unfold_bus.reshape(b, u * s)).reshape(b * u, s, *x_bt.shape[2:])


def _unfold_bwd(kept, grad_us):
    unfold_bus, copies_btc = kept
    grad_bx = grad_us.reshape(len(unfold_bus), -1, *grad_us.shape[2:])
    copies = [
        jnp.where(
            _behind(copies_btc[..., c] >= 0, grad_bx), _look_up(grad_bx, copies_btc[..., c]), 0
        )
        for c in range(copies_btc.shape[-1])
    ]
    return sum(copies), None, None


unfold.defvjp(lambda x, *layout: (unfold(x, *layout), layout), _unfold_bwd)


@jax.custom_vjp
def fold(x_us: jax.Array, unfold_bus: jax.Array, copies_btc: jax.Array) -> jax.Array:
    """[b·u, s, …] → [b, t, …]: every token's first copy; zero for padding."""
    x_bx = x_us.reshape(len(unfold_bus), -1, *x_us.shape[2:])
    first_bt = copies_btc[..., 0]
    return jnp.where(_behind(first_bt >= 0, x_bx), _look_up(x_bx, first_bt), 0)


def _fold_bwd(kept, grad_bt):
    unfold_bus, copies_btc = kept
    b, u, s = unfold_bus.shape
    of_bx = unfold_bus.reshape(b, u * s)
    is_first_bx = _look_up(copies_btc[..., 0], of_bx) == jnp.arange(u * s)
    grad_bx = jnp.where(_behind(is_first_bx, grad_bt), _look_up(grad_bt, of_bx), 0)
    return grad_bx.reshape(b * u, s, *grad_bt.shape[2:]), None, None


fold.defvjp(lambda x, *layout: (fold(x, *layout), layout), _fold_bwd)


def _look_up(x_bt: jax.Array, indices_bx: jax.Array) -> jax.Array:
    """x at these indices, [b, x, …]; the index -1 reads element 0, which callers mask."""
    indices_bx = jnp.maximum(indices_bx, 0)
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x_bt, indices_bx)


def _behind(mask_bx: jax.Array, x) -> jax.Array:
    """The mask with axes added, to lie over x."""
    return mask_bx.reshape(mask_bx.shape + (1,) * (x.ndim - 2))
