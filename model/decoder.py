"""Mistral- and Llama-shaped decoders: parameters declared with nnx, computed by pure functions.

The parameters are one nested dict of fp32 arrays, layers stacked along the first axis:

    embed [v, d]   final_norm [d]   unembed [d, v] (absent where embeddings are tied)
    layers/attn_norm [l, d]   layers/{q: [l, d, n, h], k, v: [l, d, k, h], o: [l, n, h, d]}
    layers/mlp_norm [l, d]    layers/{gate, up: [l, d, f], down: [l, f, d]}

Three ways through the model: `forward` (training: a scan over the stacked layers), `prefill` (a
prompt; returns its keys and values too) and `decode` (one token per row, through the cache). The
last two take parameters from `unstack_layers`: the compiler unrolls a loop over separate arrays,
whereas a scan would copy every layer's weights at every token.

Axis letters: b batch, t position, s cache position, d width, n query head, k key/value head,
h head width, f MLP width, v vocabulary, l layer. Mirrors transformers' modeling_mistral.py.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.attention import attention, fold, unfold, visible
from model.config import DecoderConfig
from model.precision import matmul_precision
from sharding.mesh import constrain

Params = dict
Remat = Literal["none", "full"]


class Block(nnx.Module):
    """Declaration of one layer's parameters."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        d, n, k, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        f = c.intermediate_size

        def normal(shape, axes):
            value = c.initializer_range * jax.random.normal(rngs.params(), shape)
            return nnx.Param(value, out_sharding=axes)

        self.attn_norm = nnx.Param(jnp.ones((d,)), out_sharding=("act_embed",))
        self.q = normal((d, n, h), ("embed", "heads", "head_dim"))
        self.k = normal((d, k, h), ("embed", "kv_heads", "head_dim"))
        self.v = normal((d, k, h), ("embed", "kv_heads", "head_dim"))
        self.o = normal((n, h, d), ("heads", "head_dim", "embed"))
        self.mlp_norm = nnx.Param(jnp.ones((d,)), out_sharding=("act_embed",))
        self.gate = normal((d, f), ("embed", "mlp"))
        self.up = normal((d, f), ("embed", "mlp"))
        self.down = normal((f, d), ("mlp", "embed"))


class Decoder(nnx.Module):
    """Declaration of all parameters, layers stacked."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        def normal(shape, axes):
            value = c.initializer_range * jax.random.normal(rngs.params(), shape)
            return nnx.Param(value, out_sharding=axes)

        self.embed = normal((c.vocab_size, c.hidden_size), ("vocab", "embed"))
        stack = nnx.vmap(lambda r: Block(c, r), transform_metadata={nnx.PARTITION_NAME: "layers"})
        self.layers = stack(rngs.split(c.num_hidden_layers))
        self.final_norm = nnx.Param(jnp.ones((c.hidden_size,)), out_sharding=("act_embed",))
        if not c.tie_word_embeddings:
            self.unembed = normal((c.hidden_size, c.vocab_size), ("embed", "vocab"))


def _state(config: DecoderConfig, seed: int) -> nnx.State:
    with nnx.use_eager_sharding(False):  # placement is the caller's, through sharding/
        return nnx.state(Decoder(config, nnx.Rngs(seed)), nnx.Param)


def init(config: DecoderConfig, seed: int = 0) -> Params:
    """Random fp32 parameters: normal(0, initializer_range), norms at one."""
    return nnx.to_pure_dict(_state(config, seed))


def abstract(config: DecoderConfig) -> Params:
    """The parameters' shapes and dtypes (jax.ShapeDtypeStruct), nothing allocated."""
    return nnx.to_pure_dict(jax.eval_shape(partial(_state, config, 0)))


def logical_axes(config: DecoderConfig) -> Params:
    """The parameters' logical axis names (tuples, see sharding/mesh.py) in the same tree."""
    state = jax.eval_shape(partial(_state, config, 0))
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda v: v.get_metadata("out_sharding"),
            state,
            is_leaf=lambda v: isinstance(v, nnx.Variable),
        )
    )


def unstack_layers(params: Params) -> Params:
    """The same parameters with `layers` a list with one dict per layer. Empties `params["layers"]`,
    so that only one stacked array at a time exists twice."""
    stacked = params["layers"]
    names = list(stacked)
    count = stacked[names[0]].shape[0]
    layers = [{} for _ in range(count)]
    for name in names:
        array = stacked.pop(name)
        for i in range(count):
            layers[i][name] = array[i]
        del array
    return {**params, "layers": layers}


def cast(params: Params, dtype) -> Params:
    """A copy in the dtype of computation, for sampling; training keeps fp32 masters."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


# ------------------------------------------------------------------------------- pieces


def matmul(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum in x's dtype: fp32 master weights are rounded to bf16 where x is bf16."""
    return checkpoint_name(_matmul(equation, x, w.astype(x.dtype)), "product")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(equation, x, w):
    return jnp.einsum(equation, x, w, precision=matmul_precision(x.dtype))


def _matmul_bwd(equation, saved, ct):
    """JAX's own gradients, except that in the product for ∂w the narrower operand comes first.
    XLA's CPU compiler transposes the first operand, fused with the elementwise work before it: for
    the wide ones that took a tenth of a training step."""
    x, w = saved
    operands, out = equation.split("->")
    axes_x, axes_w = operands.split(",")
    precision = matmul_precision(x.dtype)
    grad_x = jnp.einsum(f"{out},{axes_w}->{axes_x}", ct, w, precision=precision)
    (axes_1, first), (axes_2, second) = sorted(
        ((axes_x, x), (out, ct)), key=lambda side: side[1].size
    )
    axes = "".join(axis for axis in axes_1 + axes_2 if axis in axes_w)
    grad_w = jnp.einsum(f"{axes_1},{axes_2}->{axes}", first, second, precision=precision)
    return grad_x, jnp.einsum(f"{axes}->{axes_w}", grad_w)


_matmul.defvjp(lambda equation, x, w: (_matmul(equation, x, w), (x, w)), _matmul_bwd)


def rms_norm(x: jax.Array, weight_d: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) · weight over the last axis; statistics in fp32 (Zhang & Sennrich 2019, Eq. 4)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight_d.astype(x.dtype)


def rope_angles(positions_bt: jax.Array, head_dim: int, theta: float):
    """cos and sin, fp32 [b, t, 1, h/2], of each position's rotation (Su et al. 2021, §3.4.2)."""
    frequency_h = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_bt[:, :, None, None].astype(jnp.float32) * frequency_h
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x_btnh: jax.Array, cos, sin) -> jax.Array:
    """Rotate the pairs (i, i + h/2): Hugging Face's half-split convention, computed in fp32."""
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_btnh.dtype)


def block(w: Params, config: DecoderConfig, x_btd: jax.Array, rope, attend):
    """One layer: (x_btd, kept), where `attend(q_btnh, k_btkh, v_btkh)` gives (out_btnh, kept)."""
    with jax.named_scope("attention"):
        y_btd = rms_norm(x_btd, w["attn_norm"], config.rms_norm_eps)
        q_btnh = apply_rope(matmul("btd,dnh->btnh", y_btd, w["q"]), *rope)
        k_btkh = apply_rope(matmul("btd,dkh->btkh", y_btd, w["k"]), *rope)
        v_btkh = matmul("btd,dkh->btkh", y_btd, w["v"])
        q_btnh = constrain(q_btnh, "batch", "length", "heads", "head_dim")
        out_btnh, kept = attend(q_btnh, k_btkh, v_btkh)
        # As one axis e: over two axes (n, h), XLA's CPU compiler transposes the weights each call.
        out_bte = out_btnh.reshape(*out_btnh.shape[:2], -1)
        x_btd = x_btd + matmul("bte,ed->btd", out_bte, w["o"].reshape(-1, w["o"].shape[-1]))
        x_btd = constrain(x_btd, "batch", "length", "act_embed")
    with jax.named_scope("mlp"):
        y_btd = rms_norm(x_btd, w["mlp_norm"], config.rms_norm_eps)
        gate_btf = matmul("btd,df->btf", y_btd, w["gate"])
        up_btf = matmul("btd,df->btf", y_btd, w["up"])
        hidden_btf = constrain(jax.nn.silu(gate_btf) * up_btf, "batch", "length", "mlp")
        x_btd = x_btd + matmul("btf,fd->btd", hidden_btf, w["down"])
    return constrain(x_btd, "batch", "length", "act_embed"), kept


def embed(params: Params, tokens_bt: jax.Array, dtype) -> jax.Array:
    x_btd = params["embed"].astype(dtype)[tokens_bt]
    return constrain(x_btd, "batch", "length", "act_embed")


def logits(params: Params, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """fp32 logits [..., v] of final hidden states [..., d]."""
    if config.tie_word_embeddings:
        equation, w = "...d,vd->...v", params["embed"]
    else:
        equation, w = "...d,dv->...v", params["unembed"]
    return jnp.einsum(
        equation,
        hidden,
        w.astype(hidden.dtype),
        precision=matmul_precision(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


# ------------------------------------------------------------------- ways through the model


@partial(jax.jit, static_argnames="config")
def _rope_and_mask(config: DecoderConfig, tokens_bt, positions_bt, allowed_bts):
    if positions_bt is None:
        positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
    rope = rope_angles(positions_bt, config.head_dim, config.rope_theta)
    return rope, visible(positions_bt, positions_bt, allowed_bts, config.sliding_window)


def forward(
    params: Params,
    config: DecoderConfig,
    tokens_bt: jax.Array,
    positions_bt: jax.Array | None = None,
    allowed_bts: jax.Array | None = None,
    dtype=jnp.float32,
    remat: Remat = "none",
    layout: dict[str, jax.Array] | None = None,
) -> jax.Array:
    """Final hidden states [b, t, d] (after the last norm) of whole sequences.

    tokens_bt: int ids. positions_bt: each token's position in its own sequence (None: 0, 1, …).
    allowed_bts: bool, which keys a query may see, at or before its position (None: all of its row);
    padding, and other sequences in the row, are not allowed.
    layout: `unfold`, `segments` and `copies` of model/packing.py. Attention is then computed in the
    unfolded rows, and `segments` takes the place of allowed_bts.
    remat: what the backward pass computes again instead of keeping it. "none": only elementwise
    results, which are quicker to compute than to write and read; products and attention's output
    are kept. "full": everything but each layer's input, for a third more operations.
    """
    rope, seen_bts = _rope_and_mask(config, tokens_bt, positions_bt, allowed_bts)
    if layout is not None:
        places, seen_bts = (layout["unfold"], layout["copies"]), _same_segment(config, layout)

    def attend(q_btnh, k_btkh, v_btkh):
        if layout is None:
            return attention(q_btnh, *_cache_layout(k_btkh, v_btkh), seen_bts), None
        unfolded = (unfold(x, *places) for x in (q_btnh, k_btkh, v_btkh))
        q, k, v = (constrain(x, "batch", "length", "heads", "head_dim") for x in unfolded)
        return fold(attention(q, *_cache_layout(k, v), seen_bts), *places), None

    def body(x_btd, w):
        return block(w, config, x_btd, rope, attend)[0], None

    x_btd = embed(params, tokens_bt, dtype)
    keep = {"none": jax.checkpoint_policies.save_only_these_names("product"), "full": None}
    body = jax.checkpoint(body, policy=keep[remat])
    x_btd, _ = jax.lax.scan(body, x_btd, params["layers"])
    return rms_norm(x_btd, params["final_norm"], config.rms_norm_eps)


def _same_segment(config: DecoderConfig, layout: dict[str, jax.Array]) -> jax.Array:
    """Which tokens see which in the unfolded rows, bool [b·u, s, s]. Positions count through a row,
    since only the distance between two tokens of one text matters."""
    segments_us = layout["segments"].reshape(-1, layout["segments"].shape[-1])
    places_us = jnp.broadcast_to(jnp.arange(segments_us.shape[-1]), segments_us.shape)
    same_uss = segments_us[:, :, None] == segments_us[:, None, :]
    return visible(places_us, places_us, same_uss, config.sliding_window)


def prefill(
    params: Params,
    config: DecoderConfig,
    tokens_bt: jax.Array,
    positions_bt: jax.Array | None = None,
    allowed_bts: jax.Array | None = None,
    dtype=jnp.float32,
):
    """As `forward`, with the keys and values: (hidden, [(k_bkht, v_bkth) of each layer]).

    params: unstacked. Padding behind a sequence needs no mask: nothing before it sees it. Outside
    jit, one compiled layer is called for all layers, which is quicker when lengths vary.
    """
    rope, seen_bts = _rope_and_mask(config, tokens_bt, positions_bt, allowed_bts)
    x_btd, cache = embed(params, tokens_bt, dtype), []
    for w in params["layers"]:
        x_btd, kv = _prefill_layer(w, config, x_btd, rope, seen_bts)
        cache.append(kv)
    return rms_norm(x_btd, params["final_norm"], config.rms_norm_eps), cache


@partial(jax.jit, static_argnames="config")
def _prefill_layer(w: Params, config: DecoderConfig, x_btd, rope, seen_bts):
    def attend(q_btnh, k_btkh, v_btkh):
        kv = _cache_layout(k_btkh, v_btkh)
        return attention(q_btnh, *kv, seen_bts), kv

    return block(w, config, x_btd, rope, attend)


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


# Logical axes of a layer's keys and values.
CACHE_AXES = (
    ("batch", "kv_heads", "head_dim", "length"),
    ("batch", "kv_heads", "length", "head_dim"),
)


def constrain_cache(k_bkhs: jax.Array, v_bksh: jax.Array):
    return tuple(constrain(x, *axes) for x, axes in zip((k_bkhs, v_bksh), CACHE_AXES))


def decode(
    params: Params,
    config: DecoderConfig,
    cache: list,
    tokens_b: jax.Array,
    positions_b: jax.Array,
    dtype=jnp.float32,
):
    """One token per row, written into the cache at its row's position: (hidden_bd after the last
    norm, cache).

    params: unstacked. tokens_b, positions_b: int [b]; a row's cache is filled below its position. A
    position beyond the cache overwrites the cache's last one: that row's answer cannot go on.
    """
    length = cache[0][0].shape[-1]
    rope = rope_angles(positions_b[:, None], config.head_dim, config.rope_theta)
    keys_bs = jnp.broadcast_to(jnp.arange(length), (tokens_b.shape[0], length))
    seen_bts = visible(positions_b[:, None], keys_bs, None, config.sliding_window)

    @jax.jit  # traced and lowered once for all layers
    def layer(w, x_btd, k_bkhs, v_bksh):
        def attend(q_btnh, k_btkh, v_btkh):
            k, v = constrain_cache(
                _write(k_bkhs, k_btkh[:, 0], positions_b, axis=2),
                _write(v_bksh, v_btkh[:, 0], positions_b, axis=1),
            )
            return attention(q_btnh, k, v, seen_bts), (k, v)

        return block(w, config, x_btd, rope, attend)

    x_btd, new_cache = embed(params, tokens_b[:, None], dtype), []
    for w, kv in zip(params["layers"], cache):
        x_btd, kv = layer(w, x_btd, *kv)
        new_cache.append(kv)
    hidden_btd = rms_norm(x_btd, params["final_norm"], config.rms_norm_eps)
    return hidden_btd[:, 0], new_cache


def _write(cache, new, positions_b, axis: int):
    """The cache with one position of each row replaced, in place if the caller donates it. `axis`
    is that of the positions within a row. (For an indexed scatter, TPU compilers would choose
    another layout of the cache and hold it twice.)"""

    def one_row(row, new, position):
        new = jnp.expand_dims(new, axis)
        return jax.lax.dynamic_update_slice_in_dim(row, new, position, axis)

    return jax.vmap(one_row)(cache, new, positions_b)


def _cache_layout(k_btkh: jax.Array, v_btkh: jax.Array):
    return jnp.transpose(k_btkh, (0, 2, 3, 1)), jnp.transpose(v_btkh, (0, 2, 1, 3))
