"""The DeBERTa-v3 encoder: disentangled attention over content and relative position.

The score of a query for a key has three terms (He et al. 2021, arXiv 2006.03654, Eq. 4): content to
content, content to position and position to content,

    score[q, k] = (Q_q·K_k + Q_q·PK[B(q − k)] + K_k·PQ[B(q − k)]) / √(3h)

where PK and PQ are the layer's own key and query projections of one table of relative positions,
and B gives near distances a row each and far ones a shared row. PK and PQ depend on weights alone,
so `prepare` computes them once, not at every forward. Mirrors transformers' modeling_deberta_v2.py.

The parameters are a nested dict of fp32 arrays, `layers` a list with one dict per layer:

    embed [v, d]   embed_norm, embed_shift [d]   relative [p, d]   relative_norm, relative_shift [d]
    layers/i/{q, k, v: [d, n, h], q_bias, k_bias, v_bias: [n, h], o: [n, h, d], o_bias [d],
              attn_norm, attn_shift [d], up [d, f], up_bias [f], down [f, d], down_bias [d],
              mlp_norm, mlp_shift [d]}

`prepare` gives matrices the dtype of the products' operands, norms and biases that of activations.

Axis letters: b sequence, t query token, s key token, d width, n head, h head width, f MLP width,
p row of the table of relative positions, v vocabulary, r token that is read out.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model.precision import FLOAT32, Precision, product
from model.rankers import deberta_tpu
from model.weights import check_positive, check_whole
from sharding.errors import UserError
from sharding.mesh import by_rows

Params = dict
BLOCK = 256  # queries at a time, on CPU

# HF name → our path, HF's axes, our axes (model/tensors.py).
TABLE = {
    "embeddings.word_embeddings.weight": ("embed", "v d", "v d"),
    "embeddings.LayerNorm.weight": ("embed_norm", "d", "d"),
    "embeddings.LayerNorm.bias": ("embed_shift", "d", "d"),
    "encoder.rel_embeddings.weight": ("relative", "p d", "p d"),
    "encoder.LayerNorm.weight": ("relative_norm", "d", "d"),
    "encoder.LayerNorm.bias": ("relative_shift", "d", "d"),
    "encoder.layer.{}.attention.self.query_proj.weight": ("layers/{}/q", "nh d", "d n h"),
    "encoder.layer.{}.attention.self.query_proj.bias": ("layers/{}/q_bias", "nh", "n h"),
    "encoder.layer.{}.attention.self.key_proj.weight": ("layers/{}/k", "nh d", "d n h"),
    "encoder.layer.{}.attention.self.key_proj.bias": ("layers/{}/k_bias", "nh", "n h"),
    "encoder.layer.{}.attention.self.value_proj.weight": ("layers/{}/v", "nh d", "d n h"),
    "encoder.layer.{}.attention.self.value_proj.bias": ("layers/{}/v_bias", "nh", "n h"),
    "encoder.layer.{}.attention.output.dense.weight": ("layers/{}/o", "d nh", "n h d"),
    "encoder.layer.{}.attention.output.dense.bias": ("layers/{}/o_bias", "d", "d"),
    "encoder.layer.{}.attention.output.LayerNorm.weight": ("layers/{}/attn_norm", "d", "d"),
    "encoder.layer.{}.attention.output.LayerNorm.bias": ("layers/{}/attn_shift", "d", "d"),
    "encoder.layer.{}.intermediate.dense.weight": ("layers/{}/up", "f d", "d f"),
    "encoder.layer.{}.intermediate.dense.bias": ("layers/{}/up_bias", "f", "f"),
    "encoder.layer.{}.output.dense.weight": ("layers/{}/down", "d f", "f d"),
    "encoder.layer.{}.output.dense.bias": ("layers/{}/down_bias", "d", "d"),
    "encoder.layer.{}.output.LayerNorm.weight": ("layers/{}/mlp_norm", "d", "d"),
    "encoder.layer.{}.output.LayerNorm.bias": ("layers/{}/mlp_shift", "d", "d"),
}


# ------------------------------------------------------------------------- the config

# The only values that are built.
BUILT = {
    "model_type": "deberta-v2",
    "hidden_act": "gelu",
    "relative_attention": True,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "conv_kernel_size": 0,
}
# transformers' defaults (DebertaV2Config) that differ from what is built.
DEFAULTS = {
    "relative_attention": False,
    "share_att_key": False,
    "norm_rel_ebd": "none",
    "pos_att_type": "",
    "position_biased_input": True,
}


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
    """Shape and constants of one DeBERTa-v2/v3 encoder (disentangled attention, c2p and p2c)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    position_buckets: int  # per sign; the first half one token wide, then logarithmic
    max_relative_positions: int  # the distance at which the last bucket begins

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check = check_positive if field.name == "layer_norm_eps" else check_whole
            check(field.name, getattr(self, field.name))
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Axis letter → size, as this file uses the letters."""
        return {
            "v": self.vocab_size,
            "d": self.hidden_size,
            "n": self.num_attention_heads,
            "h": self.head_dim,
            "f": self.intermediate_size,
            "p": 2 * self.position_buckets,
        }


def from_hf(hf: dict) -> DebertaConfig:
    """Read the `config.json` of a DeBERTa-v2 or v3 encoder. UserError names what is not built: a
    convolution (v2-xlarge), absolute positions, separate keys for positions."""
    for key, built in BUILT.items():
        value = hf.get(key, DEFAULTS.get(key, built))
        if key == "pos_att_type":
            kinds = value.split("|") if isinstance(value, str) else (value or [])
            same = {kind.strip() for kind in kinds} == {"c2p", "p2c"}
        else:
            same = value == built
        if not same:
            raise UserError(f"{key} {value!r} is not built: {built!r} is")
    keys = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    for key in keys:
        if key not in hf:
            raise UserError(f"{key} is missing")
    head_dim = hf["hidden_size"] // hf["num_attention_heads"]
    for key, built in (("embedding_size", hf["hidden_size"]), ("attention_head_size", head_dim)):
        if hf.get(key) not in (None, built):
            raise UserError(f"{key} {hf[key]!r} is not built: {built!r} is")
    furthest = hf.get("max_relative_positions", -1)
    return DebertaConfig(
        **{key: hf[key] for key in keys},
        layer_norm_eps=hf.get("layer_norm_eps", 1e-7),
        position_buckets=hf.get("position_buckets", -1),
        max_relative_positions=hf.get("max_position_embeddings", 512) if furthest < 1 else furthest,
    )


# ------------------------------------------------------------------------- positions


def relative_rows(config: DebertaConfig, length: int) -> np.ndarray:
    """B(δ) for δ = −(length−1) … length−1: rows of the table of relative positions, int32.

    Distances up to half the buckets have a row each. Farther distances share rows, more of them
    per row the farther they are (logarithmically); all beyond the last row share it. Computed in
    fp32, as torch's make_log_bucket_position does: where the logarithm falls on a bucket's border,
    rounding decides.
    """
    half = config.position_buckets // 2
    distance = np.arange(-(length - 1), length)
    far = np.maximum(np.abs(distance), half).astype(np.float32)
    scale = np.log(np.float32((config.max_relative_positions - 1) / half))
    logarithm = np.log(far / np.float32(half)) / scale * np.float32(half - 1)
    bucket = np.where(far <= half, np.abs(distance), np.ceil(logarithm) + half)
    rows = np.sign(distance) * bucket.astype(np.int64) + config.position_buckets
    return np.clip(rows, 0, 2 * config.position_buckets - 1).astype(np.int32)


def prepare(params: Params, config: DebertaConfig, precision: Precision = FLOAT32) -> Params:
    """The parameters in the dtypes of `precision`, ready for `encode`: each layer holds its
    projections of the table of relative positions, `position_k` [n, h, p] and `position_q`
    [n, p, h], instead of the table. Empties `params["layers"]`."""
    relative_pd = layer_norm(
        params["relative"], params["relative_norm"], params["relative_shift"], config
    )

    @jax.jit
    def project(w_dnh, bias_nh):
        return matmul("pd,dnh->nph", relative_pd, w_dnh) + bias_nh[:, None]

    def stored(name: str, array: jax.Array) -> jax.Array:
        is_activation = name.endswith(("norm", "shift", "bias"))
        return array.astype(precision.activations if is_activation else precision.operands)

    ready = {name: stored(name, params[name]) for name in ("embed", "embed_norm", "embed_shift")}
    ready["layers"] = []
    while params["layers"]:  # one by one, so that only one layer exists twice
        w = params["layers"].pop(0)
        w["position_k"] = jnp.swapaxes(project(w["k"], w["k_bias"]), 1, 2)
        w["position_q"] = project(w["q"], w["q_bias"])
        ready["layers"].append({name: stored(name, array) for name, array in w.items()})
    return ready


# ---------------------------------------------------------------------------- pieces


def matmul(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """The product in the weights' dtype of operands, in the dtype of x."""
    return product(equation, x, w, w.dtype).astype(x.dtype)


def layer_norm(x: jax.Array, weight_d, bias_d, config: DebertaConfig) -> jax.Array:
    """(x − mean) / std · weight + bias over the last axis, in fp32, the variance biased."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    normal = x32 * jax.lax.rsqrt(variance + config.layer_norm_eps)
    return (normal * weight_d.astype(jnp.float32) + bias_d.astype(jnp.float32)).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """x·Φ(x), exact: Hugging Face's "gelu"."""
    return x * (0.5 * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))).astype(x.dtype)


def take(matrix: jax.Array, places: jax.Array) -> jax.Array:
    """Elements by their places in the flattened matrix, which must lie within it. On CPU several
    times as fast as take_along_axis, which checks each index in both dimensions."""
    unsigned = places.astype(jnp.uint32)  # signed ones JAX would check for negative values
    return matrix.reshape(-1).at[unsigned].get(mode="promise_in_bounds")


def in_blocks(function: Callable, most: int, *arrays: jax.Array) -> jax.Array:
    """function(*arrays), computed in blocks of at most so many rows, one after the other."""
    rows = len(arrays[0])
    blocks = -(-rows // most)
    if blocks == 1:
        return function(*arrays)
    size = -(-rows // blocks)
    padded = [jnp.pad(x, ((0, blocks * size - rows), (0, 0))) for x in arrays]
    cut = [x.reshape(blocks, size, -1) for x in padded]
    done = jax.lax.map(lambda block: function(*block), cut)
    return done.reshape(blocks * size, -1)[:rows]


def attention(q_nbth, k_nbhs, v_nbsh, position_k_nhp, position_q_nph, rows_bts, real_bs):
    """Disentangled attention, [n, b, t, h]. rows_bts: the row of the position tables for each query
    and key (b may be 1); real_bs: which keys are text and not padding.

    On CPU it is computed block by block, each of some queries of one head of one sequence, so that
    the arrays of queries times keys fit into a core's cache. Elsewhere all at once. (TPUs have a
    kernel in deberta_tpu.py.)
    """
    multiply = partial(product, operands=position_k_nhp.dtype)
    scale = np.float32((3 * q_nbth.shape[-1]) ** -0.5)
    rows_bts = jnp.broadcast_to(rows_bts, (q_nbth.shape[1], *rows_bts.shape[1:]))

    def all_heads(over, most, arrays):
        def one_head(head):
            *sequences, position_k_hp, position_q_ph = head

            def one_sequence(sequence):
                q_th, k_hs, v_sh, rows_ts, real_s = sequence
                p2c_ps = multiply("ph,hs->ps", position_q_ph, k_hs)

                def one_block(q_th, rows_ts):
                    c2p_tp = multiply("th,hp->tp", q_th, position_k_hp)
                    scores_ts = multiply("th,hs->ts", q_th, k_hs)
                    (t, p), s = c2p_tp.shape, k_hs.shape[1]
                    scores_ts += take(c2p_tp, jnp.arange(t)[:, None] * p + rows_ts)
                    scores_ts += take(p2c_ps, rows_ts * s + jnp.arange(s))
                    scores_ts = jnp.where(real_s, scores_ts * scale, -1e30)
                    weights_ts = jnp.exp(scores_ts - jnp.max(scores_ts, axis=-1, keepdims=True))
                    out_th = multiply("ts,sh->th", weights_ts, v_sh)
                    # Divided last: h numbers per query instead of s.
                    return (out_th / jnp.sum(weights_ts, axis=-1)[:, None]).astype(q_th.dtype)

                return in_blocks(one_block, most, q_th, rows_ts)

            return over(one_sequence)((*sequences, rows_bts, real_bs))

        return over(one_head)(arrays)

    arrays = (q_nbth, k_nbhs, v_nbsh, position_k_nhp, position_q_nph)
    return jax.lax.platform_dependent(
        arrays,
        cpu=partial(all_heads, lambda function: partial(jax.lax.map, function), BLOCK),
        default=partial(all_heads, jax.vmap, q_nbth.shape[2]),
    )


@partial(jax.jit, static_argnames="config")
def embed(params: Params, config: DebertaConfig, tokens_bt: jax.Array) -> jax.Array:
    x_btd = params["embed"][tokens_bt].astype(params["embed_norm"].dtype)
    return layer_norm(x_btd, params["embed_norm"], params["embed_shift"], config)


@partial(jax.jit, static_argnames=("config", "kernel"))
def layer(
    w: Params, config: DebertaConfig, x_btd, real_bt, read_br=None, kernel: bool = False
) -> jax.Array:
    """One layer, each device of the mesh computing its sequences: see `_layer`."""
    function = partial(_layer, config=config, kernel=kernel)
    return by_rows(function)(w, x_btd, real_bt, read_br)


def _layer(w: Params, x_btd, real_bt, read_br, config: DebertaConfig, kernel: bool) -> jax.Array:
    """One layer over all tokens [b, t, d]; with `read_br`, its output at those tokens alone,
    [b, r, d]. kernel: compute attention for all tokens by the kernel of deberta_tpu.py, if it is
    built for this length. On a TPU that is quicker than look-ups, even for a few tokens."""
    t = x_btd.shape[1]
    kernel = kernel and deberta_tpu.takes(t)
    by_distance = relative_rows(config, t)
    rows, keys = jnp.asarray(by_distance), jnp.arange(t)
    if read_br is None:
        y_btd, rows_bts = x_btd, rows[t - 1 + keys[:, None] - keys][None]
    else:
        y_btd = jnp.take_along_axis(x_btd, read_br[:, :, None], axis=1)
        rows_bts = rows[t - 1 + read_br[:, :, None] - keys]
    with jax.named_scope("attention"):
        q_btnh = matmul("btd,dnh->btnh", x_btd if kernel else y_btd, w["q"]) + w["q_bias"]
        k_bsnh = matmul("btd,dnh->btnh", x_btd, w["k"]) + w["k_bias"]
        v_bsnh = matmul("btd,dnh->btnh", x_btd, w["v"]) + w["v_bias"]
        arrays = (
            jnp.transpose(q_btnh, (2, 0, 1, 3)),
            jnp.transpose(k_bsnh, (2, 0, 3, 1)),
            jnp.transpose(v_bsnh, (2, 0, 1, 3)),
            w["position_k"],
            w["position_q"],
        )
        if kernel:
            out_nbth = deberta_tpu.attention(*arrays, by_distance, real_bt)
            if read_br is not None:
                out_nbth = jnp.take_along_axis(out_nbth, read_br[None, :, :, None], axis=2)
        else:
            out_nbth = attention(*arrays, rows_bts, real_bt)
        out_btnh = jnp.transpose(out_nbth, (1, 2, 0, 3))
        out_bte = out_btnh.reshape(*out_btnh.shape[:2], -1)
        out_btd = matmul("bte,ed->btd", out_bte, w["o"].reshape(-1, w["o"].shape[-1]))
        y_btd = layer_norm(y_btd + out_btd + w["o_bias"], w["attn_norm"], w["attn_shift"], config)
    with jax.named_scope("mlp"):
        hidden_btf = gelu(matmul("btd,df->btf", y_btd, w["up"]) + w["up_bias"])
        out_btd = matmul("btf,fd->btd", hidden_btf, w["down"]) + w["down_bias"]
        return layer_norm(y_btd + out_btd, w["mlp_norm"], w["mlp_shift"], config)


def encode(
    params: Params,
    config: DebertaConfig,
    tokens_bt: jax.Array,
    lengths_b: jax.Array,
    read_br: jax.Array,
    kernel: bool = False,
) -> jax.Array:
    """The last layer's hidden states at the tokens `read_br`: [b, r, d] in the activations' dtype.

    params: from `prepare`. tokens_bt: int ids, text first, padding behind; lengths_b: how many are
    text; kernel: see `layer`. The last layer computes only the tokens that are read (with the
    kernel, attention for all). Runs inside jit or outside. Outside, each layer is one call of the
    same compiled program, which copies no weights and is compiled once for all layers.
    """
    real_bt = jnp.arange(tokens_bt.shape[1]) < lengths_b[:, None]
    x_btd = embed({k: v for k, v in params.items() if k != "layers"}, config, tokens_bt)
    for w in params["layers"][:-1]:
        x_btd = layer(w, config, x_btd, real_bt, kernel=kernel)
    return layer(params["layers"][-1], config, x_btd, real_bt, read_br, kernel)
