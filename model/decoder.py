"""Mistral- and Llama-shaped decoders: parameters declared with nnx, computed by pure functions.

The parameters are one nested dict of fp32 arrays, layers stacked along the first axis:

    embed [v, d]   final_norm [d]   unembed [d, v] (absent where embeddings are tied)
    layers/attn_norm [l, d]   layers/{q: [l, d, n, h], k, v: [l, d, k, h], o: [l, n, h, d]}
    layers/mlp_norm [l, d]    layers/{gate, up: [l, d, f], down: [l, f, d]}

Here are the parameters and the pieces of a layer. model/forward.py goes through the model in
training, model/kv_cache.py in sampling.

Axis letters: b batch, t position, d width, n query head, k key/value head, h head width,
f MLP width, v vocabulary, l layer. Mirrors transformers' modeling_mistral.py.
"""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from model.config import DecoderConfig
from model.precision import Precision, product
from sharding.mesh import constrain, placed

Params = dict


def _normal(c: DecoderConfig, rngs: nnx.Rngs, shape, axes) -> nnx.Param:
    value = c.initializer_range * jax.random.normal(rngs.params(), shape)
    return nnx.Param(value, out_sharding=axes)


class Block(nnx.Module):
    """Declaration of one layer's parameters."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        d, n, k, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        f, normal = c.intermediate_size, partial(_normal, c, rngs)
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
        normal = partial(_normal, c, rngs)
        self.embed = normal((c.vocab_size, c.hidden_size), ("vocab", "embed"))
        stack = nnx.vmap(lambda r: Block(c, r), transform_metadata={nnx.PARTITION_NAME: "layers"})
        self.layers = stack(rngs.split(c.num_hidden_layers))
        self.final_norm = nnx.Param(jnp.ones((c.hidden_size,)), out_sharding=("act_embed",))
        if not c.tie_word_embeddings:
            self.unembed = normal((c.hidden_size, c.vocab_size), ("embed", "vocab"))


def _state(config: DecoderConfig, seed: int) -> nnx.State:
    with nnx.use_eager_sharding(False):  # placement is the caller's, through sharding/
        return nnx.state(Decoder(config, nnx.Rngs(seed)), nnx.Param)


def abstract(config: DecoderConfig, mesh=None, dtype=jnp.float32) -> Params:
    """The parameters' shapes (jax.ShapeDtypeStruct), with their shardings if there is a mesh.
    Nothing is allocated, and the mesh may be one without devices."""

    def shape_of(variable):
        shape = jax.ShapeDtypeStruct(variable.shape, dtype)
        return shape if mesh is None else placed(shape, variable.get_metadata("out_sharding"), mesh)

    state = jax.eval_shape(partial(_state, config, 0))
    shapes = jax.tree.map(shape_of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(shapes)


def stored_in(params: Params, precision: Precision) -> Params:
    """The parameters as sampling stores them: matrices in the dtype of computation, norms as what
    they scale."""

    def cast(path, x):
        is_norm = "norm" in path[-1].key
        return x.astype(precision.activations if is_norm else precision.operands)

    return jax.tree_util.tree_map_with_path(cast, params)


# ------------------------------------------------------------------------------- pieces


def matmul(equation: str, x: jax.Array, w: jax.Array, operands) -> jax.Array:
    """model/precision.py's product of activations and a weight, in x's dtype. The weight's gradient
    comes in its own dtype: it is not rounded before the devices' shares of it are summed."""
    return checkpoint_name(_matmul(equation, x, w, operands), "product")


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _matmul(equation, x, w, operands):
    return product(equation, x, w, operands).astype(x.dtype)


def _matmul_fwd(equation, x, w, operands):
    return _matmul(equation, x, w, operands), (x, w)


def _matmul_bwd(equation, operands, saved, ct):
    """JAX's own gradients; the cotangent is an operand too, and rounded as such."""
    x, w = saved
    axes_x, axes_w, out = re.split(",|->", equation)
    grad_x = product(f"{out},{axes_w}->{axes_x}", ct, w, operands).astype(x.dtype)
    on_cpu_in_bf16 = operands != x.dtype
    grad_w = _weight_gradient((axes_x, x), (out, ct), axes_w, operands, on_cpu_in_bf16)
    return grad_x, grad_w.astype(w.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _weight_gradient(x, ct, axes_w, operands, as_matrices: bool):
    """∂w of (axes, array) of the activations and of the cotangent. In fp32 and as matrices the
    narrower one comes first: XLA's CPU compiler transposes the first operand, fused with the
    elementwise work before it, and for the wide ones that took a tenth of a training step. (In bf16
    that compiler has no such product whose result is transposed.)"""
    sides = (x, ct)
    if operands == jnp.float32 or as_matrices:
        sides = sorted(sides, key=lambda side: side[1].size)
    (axes_1, first), (axes_2, second) = sides
    axes = "".join(axis for axis in axes_1 + axes_2 if axis in axes_w)
    if as_matrices:
        grad_w = _product_of_columns(axes_1, first, axes_2, second, operands)
    else:
        grad_w = product(f"{axes_1},{axes_2}->{axes}", first, second, operands)
    return jnp.einsum(f"{axes}->{axes_w}", grad_w)


def _product_of_columns(axes_1, first, axes_2, second, operands):
    """The product of two arrays over the axes that begin both, as one of two matrices, the first
    transposed beforehand. XLA's CPU compiler has bf16 products for no other form: the layouts are
    prescribed, since it would choose those for which it has none."""
    rows = "".join(a for a in axes_1 if a in axes_2)
    by_row = [
        x.astype(operands).reshape(-1, math.prod(x.shape[len(rows) :])) for x in (first, second)
    ]
    as_written = Layout((0, 1))
    first_ar = with_layout_constraint(by_row[0].T, as_written)
    made_ab = with_layout_constraint(
        product("ar,rb->ab", first_ar, by_row[1], operands), as_written
    )
    return made_ab.reshape(first.shape[len(rows) :] + second.shape[len(rows) :])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, weight_d: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) · weight over the last axis; statistics in fp32 (Zhang & Sennrich 2019, Eq. 4)."""
    return _normalised(x, eps)[0].astype(x.dtype) * weight_d.astype(x.dtype)


def _normalised(x, eps):
    """(x / rms(x), 1 / rms(x)), fp32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32 * scale, scale


def _rms_norm_bwd(eps, saved, ct):
    """All sums in fp32. JAX's own gradient takes XLA's CPU compiler about ten times as long: it
    computes row by row what is here an einsum."""
    x, weight_d = saved
    (normal, scale), ct = _normalised(x, eps), ct.astype(jnp.float32)
    grad = ct * weight_d
    highest = jax.lax.Precision.HIGHEST
    mean = jnp.einsum("...d,...d->...", grad, normal, precision=highest)[..., None] / x.shape[-1]
    grad_w = jnp.sum(ct * normal, axis=tuple(range(x.ndim - 1)))
    return (scale * (grad - normal * mean)).astype(x.dtype), grad_w.astype(weight_d.dtype)


rms_norm.defvjp(lambda x, w, eps: (rms_norm(x, w, eps), (x, w)), _rms_norm_bwd)


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


def block(w: Params, config: DecoderConfig, x_btd: jax.Array, rope, attend, operands):
    """One layer: (x_btd, kept), where `attend(q_btnh, k_btkh, v_btkh)` gives (out_btnh, kept)."""
    multiply = partial(matmul, operands=operands)
    with jax.named_scope("attention"):
        y_btd = rms_norm(x_btd, w["attn_norm"], config.rms_norm_eps)
        q_btnh = apply_rope(multiply("btd,dnh->btnh", y_btd, w["q"]), *rope)
        k_btkh = apply_rope(multiply("btd,dkh->btkh", y_btd, w["k"]), *rope)
        v_btkh = multiply("btd,dkh->btkh", y_btd, w["v"])
        q_btnh = constrain(q_btnh, "batch", "length", "heads", "head_dim")
        out_btnh, kept = attend(q_btnh, k_btkh, v_btkh)
        # As one axis e: over two axes (n, h), XLA's CPU compiler transposes the weights each call.
        out_bte = out_btnh.reshape(*out_btnh.shape[:2], -1)
        x_btd = x_btd + multiply("bte,ed->btd", out_bte, w["o"].reshape(-1, w["o"].shape[-1]))
        x_btd = constrain(x_btd, "batch", "length", "act_embed")
    with jax.named_scope("mlp"):
        y_btd = rms_norm(x_btd, w["mlp_norm"], config.rms_norm_eps)
        gate_btf = multiply("btd,df->btf", y_btd, w["gate"])
        up_btf = multiply("btd,df->btf", y_btd, w["up"])
        hidden_btf = constrain(jax.nn.silu(gate_btf) * up_btf, "batch", "length", "mlp")
        x_btd = x_btd + multiply("btf,fd->btd", hidden_btf, w["down"])
    return constrain(x_btd, "batch", "length", "act_embed"), kept


def embed(params: Params, tokens_bt: jax.Array, dtype) -> jax.Array:
    # Looked up before the cast, so that the gradient of a token's row is summed in fp32.
    x_btd = params["embed"][tokens_bt].astype(dtype)
    return constrain(x_btd, "batch", "length", "act_embed")


def cache_layout(k_btkh: jax.Array, v_btkh: jax.Array):
    """Keys and values as model/attention.py takes them: (k_bkht, v_bkth)."""
    return jnp.transpose(k_btkh, (0, 2, 3, 1)), jnp.transpose(v_btkh, (0, 2, 1, 3))


def logits(
    params: Params, config: DecoderConfig, hidden: jax.Array, operands=jnp.float32
) -> jax.Array:
    """fp32 logits [..., v] of final hidden states [..., d]."""
    if config.tie_word_embeddings:
        return product("...d,vd->...v", hidden, params["embed"], operands)
    return product("...d,dv->...v", hidden, params["unembed"], operands)
