"""The forward pass through a KV cache, for sampling.

`prefill` goes through prompts and returns their keys and values; `decode` goes through one token
per row. Both take parameters from `unstack_layers`: the compiler unrolls a loop over separate
arrays, whereas a scan would copy every layer's weights at every token.

Axis letters as in model/decoder.py, and s cache position.
"""

from functools import partial

import jax
import jax.numpy as jnp

from model import attention_tpu
from model.attention import attention, decode_attention, visible
from model.config import DecoderConfig
from model.decoder import (
    Params,
    block,
    cache_layout,
    embed,
    rms_norm,
    rope_angles,
)
from model.precision import FLOAT32, Precision
from sharding.mesh import by_axes, constrain, placed


def unstack_layers(params: Params) -> Params:
    """The parameters with `layers` a list with one dict per layer. Empties `params["layers"]`, so
    that only one stacked array at a time exists twice."""
    stacked = params["layers"]
    layers: list[dict] = [{} for _ in range(stacked["q"].shape[0])]
    for name in list(stacked):
        weights = stacked.pop(name)
        for i, layer in enumerate(layers):
            layer[name] = weights[i]
    return {**params, "layers": layers}


def unstacked(params: Params) -> Params:
    """Shapes with shardings (`decoder.abstract`) as `unstack_layers` leaves the parameters."""

    def of_layer(x):
        sharding = jax.NamedSharding(x.sharding.mesh, jax.P(*x.sharding.spec[1:]))
        return x.update(shape=x.shape[1:], sharding=sharding)

    count = params["layers"]["q"].shape[0]
    return params | {"layers": [jax.tree.map(of_layer, params["layers"])] * count}


def prefill(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    prompts: jax.Array | None = None,
    precision: Precision = FLOAT32,
):
    """(final hidden states [b, t, d], after the last norm, of whole sequences; [(k_bkht, v_bkth) of
    each layer]).

    params: unstacked. tokens, positions, prompts: int [b, t]: each token's position in its own
    sequence (None: 0, 1, …), and which sequence of its row that is (None: there is one). Padding
    behind a sequence needs no mask: nothing before it sees it. Outside jit, one compiled layer is
    called for all layers, which is quicker when lengths vary.
    """
    rope, seen_bts = _rope_and_mask(config, tokens, positions, prompts)
    x_btd, cache = embed(params, tokens, precision.activations), []
    for w in params["layers"]:
        x_btd, kv = _prefill_layer(w, config, x_btd, rope, seen_bts, precision.operands)
        cache.append(kv)
    return rms_norm(x_btd, params["final_norm"], config.rms_norm_eps), cache


@partial(jax.jit, static_argnames="config")
def _rope_and_mask(config: DecoderConfig, tokens_bt, positions_bt, prompts_bt):
    """(cos and sin of the rotations, which keys a query sees) of a row, as `prefill` takes it."""
    allowed_bts = None if prompts_bt is None else prompts_bt[:, :, None] == prompts_bt[:, None, :]
    if positions_bt is None:
        positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
    rope = rope_angles(positions_bt, config.head_dim, config.rope_theta)
    return rope, visible(positions_bt, positions_bt, allowed_bts, config.sliding_window)


@partial(jax.jit, static_argnames=("config", "operands"))
def _prefill_layer(w: Params, config: DecoderConfig, x_btd, rope, seen_bts, operands):
    def attend(q_btnh, k_btkh, v_btkh):
        kv = cache_layout(k_btkh, v_btkh)
        return attention(q_btnh, *kv, seen_bts), kv

    return block(w, config, x_btd, rope, attend, operands)


# Logical axes of a layer's keys and values.
CACHE_AXES = (
    ("batch", "kv_heads", "head_dim", "length"),
    ("batch", "kv_heads", "length", "head_dim"),
)


def constrain_cache(k_bkhs: jax.Array, v_bksh: jax.Array):
    return tuple(constrain(x, *axes) for x, axes in zip((k_bkhs, v_bksh), CACHE_AXES))


def empty_cache(config: DecoderConfig, rows: int, length: int, dtype=jnp.float32) -> list:
    """A KV cache for `rows` sequences of up to `length` positions: (k_bkhs, v_bksh) per layer."""

    @jax.jit  # on a mesh, each device makes its own share
    def one_layer():
        b, k, h = rows, config.num_key_value_heads, config.head_dim
        return constrain_cache(
            jnp.zeros((b, k, h, length), dtype), jnp.zeros((b, k, length, h), dtype)
        )

    return [one_layer() for _ in range(config.num_hidden_layers)]


def cache_bytes(config: DecoderConfig, length: int, dtype=jnp.float32) -> int:
    """Bytes of the keys and values of one sequence of up to `length` positions."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * length * jnp.dtype(dtype).itemsize


def abstract_cache(config: DecoderConfig, mesh, rows: int, length: int, dtype=jnp.float32) -> list:
    """What `empty_cache` makes, as shapes with their shardings. Nothing is allocated, and the mesh
    may be one without devices."""
    shapes = jax.eval_shape(lambda: empty_cache(config, rows, length, dtype))
    return [tuple(map(placed, kv, CACHE_AXES, (mesh, mesh))) for kv in shapes]


def decode(
    params: Params,
    config: DecoderConfig,
    cache: list,
    tokens_b: jax.Array,
    positions_b: jax.Array,
    precision: Precision = FLOAT32,
):
    """One token per row, written into the cache at its row's position: (hidden_bd after the last
    norm, cache).

    params: unstacked. tokens_b, positions_b: int [b]; a row's cache is filled below its position. A
    position beyond the cache overwrites the cache's last one: that row's answer cannot go on.
    """
    length = cache[0][0].shape[-1]
    keys_bs = jnp.broadcast_to(jnp.arange(length), (tokens_b.shape[0], length))
    seen_bts = visible(positions_b[:, None], keys_bs, None, config.sliding_window)

    def attend(kept, q_btnh, k_btkh, v_btkh):
        k_bkhs, v_bksh = kept
        k, v = constrain_cache(
            _write(k_bkhs, k_btkh[:, 0], positions_b, axis=2),
            _write(v_bksh, v_btkh[:, 0], positions_b, axis=1),
        )
        return attention(q_btnh, k, v, seen_bts), (k, v)

    return _one_token(params, config, attend, cache, tokens_b, positions_b, precision)


def _one_token(
    params: Params, config: DecoderConfig, attend, kept, tokens_b, positions_b, precision
):
    """(hidden_bd after the last norm, what is kept of each layer), with `attend` as `decoder.block`
    takes it, given what is kept of a layer first."""
    rope = rope_angles(positions_b[:, None], config.head_dim, config.rope_theta)

    @jax.jit  # traced and lowered once for all layers
    def layer(w, x_btd, of_layer):
        attend_layer = partial(attend, of_layer)
        return block(w, config, x_btd, rope, attend_layer, precision.operands)

    x_btd, new = embed(params, tokens_b[:, None], precision.activations), []
    for w, of_layer in zip(params["layers"], kept):
        x_btd, of_layer = layer(w, x_btd, of_layer)
        new.append(of_layer)
    return rms_norm(x_btd, params["final_norm"], config.rms_norm_eps)[:, 0], new


def _write(cache, new, positions_b, axis: int):
    """The cache with one position of each row replaced, in place if the caller donates it. `axis`
    is that of the positions within a row. (For an indexed scatter, TPU compilers would choose
    another layout of the cache and hold it twice.)"""

    def one_row(row, new, position):
        new = jnp.expand_dims(new, axis)
        return jax.lax.dynamic_update_slice_in_dim(row, new, position, axis)

    return jax.vmap(one_row)(cache, new, positions_b)


# ------------------------------------------------------------------------- the side buffer
#
# Each row's position differs, so writing a step's keys into the cache is a scatter. TPU compilers
# make it a loop over the rows, which takes several times as long as the rest of the step. There the
# keys and values of one call's steps are kept beside the cache, at one index for all rows, and
# merged once.

BUFFER_AXES = ("batch", "kv_heads", "length", "head_dim")


def empty_side_buffer(config: DecoderConfig, rows: int, steps: int, dtype=jnp.float32) -> list:
    """Room for the keys and values of so many steps: (k_bkjh, v_bkjh) per layer, j the step."""
    zeros_bkjh = jnp.zeros((rows, config.num_key_value_heads, steps, config.head_dim), dtype)
    empty = constrain(zeros_bkjh, *BUFFER_AXES)
    return [(empty, empty)] * config.num_hidden_layers


def decode_beside(
    params: Params,
    config: DecoderConfig,
    cache: list,
    buffer: list,
    tokens_b: jax.Array,
    start_b: jax.Array,
    step: jax.Array,
    precision: Precision = FLOAT32,
    interpret: bool = False,
):
    """As `decode`, but the token is written into the side buffer: (hidden_bd, buffer).

    start_b: int [b], where each row was at step 0 of the buffer; `step`: int, of this token. The
    cache is filled below start_b, the buffer below `step`. For TPUs; interpret: for any device.
    """
    positions_b = start_b + step
    recent_bj = start_b[:, None] + jnp.arange(buffer[0][0].shape[2])
    recent_seen_btj = visible(positions_b[:, None], recent_bj, None, config.sliding_window)
    first_b = jnp.zeros_like(positions_b)
    if config.sliding_window is not None:
        first_b = jnp.maximum(positions_b - config.sliding_window + 1, 0)

    def attend(kept, q_btnh, k_btkh, v_btkh):
        kv, *recent = kept
        k_bkjh, v_bkjh = (
            constrain(
                jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(new, 1, 2), step, 2),
                *BUFFER_AXES,
            )
            for old, new in zip(recent, (k_btkh, v_btkh))
        )
        recent = jnp.swapaxes(k_bkjh, 2, 3), v_bkjh, recent_seen_btj
        cached = partial(_cached, kv, first_b, start_b, interpret)
        return decode_attention(q_btnh, cached, recent), (k_bkjh, v_bkjh)

    kept = [(kv, *recent) for kv, recent in zip(cache, buffer)]
    return _one_token(params, config, attend, kept, tokens_b, positions_b, precision)


def _cached(kv, first_b, end_b, interpret, q_bkrh):
    """attention_tpu.attention, each device with its rows and heads."""
    rows, (keys, values) = ("batch", "kv_heads", "length", "head_dim"), CACHE_AXES
    axes = rows, keys, values, ("batch",), ("batch",)
    kernel = partial(attention_tpu.attention, interpret=interpret)
    return by_axes(kernel, axes, (rows, rows[:3], rows[:3]))(q_bkrh, *kv, first_b, end_b)


def merged(cache: list, buffer: list, start_b: jax.Array, interpret: bool = False) -> list:
    """The cache with the buffer's keys and values at start_b, start_b + 1, … of each row. Steps
    that were not taken write what is overwritten before it is read."""
    axes = *CACHE_AXES, BUFFER_AXES, BUFFER_AXES, ("batch",)
    kernel = partial(attention_tpu.merge, interpret=interpret)
    layer = jax.jit(by_axes(kernel, axes, CACHE_AXES))  # traced and lowered once
    return [layer(*kv, *recent, start_b) for kv, recent in zip(cache, buffer)]
