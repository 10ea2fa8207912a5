"""The slots of model/generate.py on the device: their state, and the programs that change it.

BY_PARTS and WHOLE are two forms of (prefill, start), which begin answers; `advance` draws their
tokens. The state is donated. Parameters are unstacked (kv_cache.unstack_layers).

Axis letters: b slot, g answer that starts, p prompt of a row, t index in a row of prompts, s cache
position, i step of a call, v vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model import decoder, drawing, kv_cache
from model.config import DecoderConfig
from model.precision import Precision
from sharding.mesh import constrain

STEPS_PER_CALL = 32  # the most decode steps before the host looks at the answers


def empty(config: DecoderConfig, slots: int, length: int, precision: Precision) -> dict:
    """The state of all slots, none of them in use."""
    starting = nothing_starts(slots, slots)
    rest = {
        "active": np.zeros(slots, bool),
        "prompt_lengths": starting["lengths"],
        "steps": np.ones(slots, np.int32),  # tokens drawn
        "last": np.zeros(slots, np.int32),  # the token drawn last
        **{name: starting[name] for name in ("keys", "limits", "ignore_eos", "settings")},
    }
    # Where the programs leave them: for numpy arrays each program would be compiled once more.
    rest = jax.jit(lambda: _replicated(jax.tree.map(jnp.asarray, rest)))()
    return rest | {"cache": kv_cache.empty_cache(config, slots, length, precision.activations)}


def nothing_starts(count: int, rows: int) -> dict:
    """Where and how `count` answers start, to be filled in. A slot beyond the last is not
    written."""
    return {
        "slots": np.full(count, rows, np.int32),
        "prompts": np.zeros(count, np.int32),  # which of the row
        "starts": np.zeros(count, np.int32),  # where it starts
        "lengths": np.ones(count, np.int32),
        "limits": np.ones(count, np.int32),  # the most tokens
        "ignore_eos": np.zeros(count, bool),
        "keys": np.zeros((count, 2), np.uint32),
        # Filters that leave all tokens, and that cost nothing.
        "settings": {
            name: np.full(count, float(name in ("temperature", "top_p")), dtype)
            for name, dtype in drawing.SETTINGS.items()
        },
    }


def arrays_held(config: DecoderConfig, mesh, slots: int, length: int, precision: Precision) -> dict:
    """{title: arrays} that a sampler holds, as shapes with their shardings: parameters in the dtype
    of computation, and a cache of `slots` rows with `length` positions each."""
    kept = kv_cache.abstract_cache(config, mesh, slots, length, precision.activations)
    keys, values = zip(*kept)
    return {
        "parameters": decoder.abstract(config, mesh, precision.operands),
        "cache": {"keys": list(keys), "values": list(values)},
    }


def _replicated(tree):
    """Whole on every device, since the host reads it."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


def _prefill(params, row, ends_p, *, config, precision):
    """(keys and values per layer, the logits [p, v] of the first tokens) of a row of prompts, whose
    last tokens are at `ends_p`."""
    hidden_1td, kv = kv_cache.prefill(params, config, **row, precision=precision)
    operands = precision.operands
    return kv, _logits(params, hidden_1td, ends_p, config=config, operands=operands)


@partial(jax.jit, static_argnames=("config", "operands"))
def _logits(params, hidden_1td, ends_p, *, config, operands):
    return decoder.logits(params, config, hidden_1td[0, ends_p], operands)


def _start(state, row_kv, logits_pv, starting, *, config):
    """(the state, the first tokens, their log-probs) after the starting answers' prompts were
    copied from a prefilled row, and their first tokens drawn."""
    cache = list(state["cache"])
    for i, kv in enumerate(row_kv):
        cache[i] = _copy_prompts(*cache[i], *kv, starting["slots"], starting["starts"])
    rest = {name: x for name, x in state.items() if name != "cache"}
    rest, *first = _first_tokens(rest, logits_pv, starting, config=config)
    return rest | {"cache": cache}, *first


# (prefill, start): on CPU compiled in parts, each layer by the same ones, since compiling takes
# longer than calling; elsewhere whole.
BY_PARTS = _prefill, _start
WHOLE = (
    jax.jit(_prefill, static_argnames=("config", "precision")),
    jax.jit(_start, static_argnames="config", donate_argnames="state"),
)


@partial(jax.jit, donate_argnums=(0, 1))
def _copy_prompts(k_bkhs, v_bksh, prompts_k, prompts_v, slots_g, starts_g):
    """One layer's cache after the prompts at `starts_g` of their row were copied to `slots_g` (a
    slot beyond the last is not written). Called layer by layer, so that one layer is compiled."""
    # What lies behind a prompt in its row is copied too, and overwritten before it is read.
    t = prompts_k.shape[-1]
    count = min(t, k_bkhs.shape[-1])
    from_gs = jnp.minimum(starts_g[:, None] + jnp.arange(count), t - 1)
    new_k = jnp.moveaxis(prompts_k[0][:, :, from_gs], 2, 0)
    new_v = jnp.moveaxis(prompts_v[0][:, from_gs], 1, 0)
    return kv_cache.constrain_cache(
        k_bkhs.at[slots_g, :, :, :count].set(new_k, mode="drop"),
        v_bksh.at[slots_g, :, :count].set(new_v, mode="drop"),
    )


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _first_tokens(state, logits_pv, starting, *, config):
    """(the state without the cache, tokens, log-probs) after the first tokens of the starting
    answers are drawn."""
    slots_g, logits_gv = starting["slots"], logits_pv[starting["prompts"]]
    uniform_g = drawing.uniforms(starting["keys"], jnp.zeros_like(slots_g))
    tokens_g, logprobs_g = drawing.draw(logits_gv, uniform_g, starting["settings"])
    new = {name: starting[name] for name in ("keys", "limits", "ignore_eos", "settings")}
    new |= {"prompt_lengths": starting["lengths"], "steps": jnp.ones_like(slots_g)}
    new |= {"last": tokens_g, "active": ~_ends(tokens_g, new, config)}
    state = jax.tree.map(lambda x, y: x.at[slots_g].set(y, mode="drop"), state, new)
    return (*_replicated((state, tokens_g, logprobs_g)),)


@partial(jax.jit, static_argnames=("config", "precision", "side_buffer"), donate_argnames="state")
def advance(params, state, stop_at_active, steps, *, config, precision, side_buffer):
    """(the state, {"tokens", "logprobs": [b, STEPS_PER_CALL]}) after tokens were drawn in all
    active slots, until at most `stop_at_active` of them are left, or `steps` times (at most
    STEPS_PER_CALL).

    side_buffer ("tpu", or "interpret" on any device): the call's keys and values are kept beside
    the cache and merged into it at the end (kv_cache.empty_side_buffer).
    """
    cache, rest = state["cache"], {name: x for name, x in state.items() if name != "cache"}
    b = len(rest["steps"])
    start_b = rest["prompt_lengths"] + rest["steps"] - 1
    # An idle slot draws as one that is in use: settings that none of these has cost nothing.
    like_b = jnp.where(rest["active"], jnp.arange(b), jnp.argmax(rest["active"]))
    settings = {name: x[like_b] for name, x in rest["settings"].items()}
    drawn = {
        "tokens": jnp.zeros((b, STEPS_PER_CALL), jnp.int32),
        "logprobs": jnp.zeros((b, STEPS_PER_CALL), jnp.float32),
    }
    kv = cache
    if side_buffer:
        kv = kv_cache.empty_side_buffer(config, b, STEPS_PER_CALL, precision.activations)

    def unfinished(carry):
        i, rest, _, _ = carry
        left = jnp.minimum(steps, STEPS_PER_CALL)
        return (i < left) & (jnp.sum(rest["active"]) > stop_at_active)

    def step(carry):
        i, rest, kv, drawn = carry
        if side_buffer:
            hidden_bd, kv = kv_cache.decode_beside(
                params,
                config,
                cache,
                kv,
                rest["last"],
                start_b,
                i,
                precision,
                interpret=side_buffer == "interpret",
            )
        else:
            positions_b = rest["prompt_lengths"] + rest["steps"] - 1
            tokens_b = rest["last"]
            hidden_bd, kv = kv_cache.decode(params, config, kv, tokens_b, positions_b, precision)
        logits_bv = decoder.logits(params, config, hidden_bd, precision.operands)
        uniform_b = drawing.uniforms(rest["keys"], rest["steps"])
        tokens_b, logprobs_b = drawing.draw(logits_bv, uniform_b, settings)
        drawn = {
            name: jax.lax.dynamic_update_slice_in_dim(drawn[name], x[:, None], i, 1)
            for name, x in (("tokens", tokens_b), ("logprobs", logprobs_b))
        }
        active_b = rest["active"]
        rest = rest | {
            "steps": rest["steps"] + active_b,
            "last": jnp.where(active_b, tokens_b, rest["last"]),
        }
        return i + 1, rest | {"active": active_b & ~_ends(tokens_b, rest, config)}, kv, drawn

    _, rest, kv, drawn = jax.lax.while_loop(unfinished, step, (0, rest, kv, drawn))
    if side_buffer:
        kv = kv_cache.merged(cache, kv, start_b, interpret=side_buffer == "interpret")
    rest, drawn = _replicated((rest, drawn))
    return rest | {"cache": kv}, drawn


def _ends(tokens: jax.Array, state: dict, config: DecoderConfig) -> jax.Array:
    """Whether an answer ends with this token, which `steps` counts already."""
    is_eos = jnp.isin(tokens, jnp.array(config.eos_token_ids, jnp.int32))
    return (is_eos & ~state["ignore_eos"]) | (state["steps"] >= state["limits"])


@partial(jax.jit, static_argnames="length")
def resize_layer(k_bkhs, v_bksh, slots_b, length):
    """One layer's cache for these slots (None: all), cut or padded to `length` positions."""
    if slots_b is not None:
        k_bkhs, v_bksh = k_bkhs[slots_b], v_bksh[slots_b]
    extra = max(length - k_bkhs.shape[-1], 0)
    return kv_cache.constrain_cache(
        jnp.pad(k_bkhs[..., :length], ((0, 0),) * 3 + ((0, extra),)),
        jnp.pad(v_bksh[:, :, :length], ((0, 0), (0, 0), (0, extra), (0, 0))),
    )


@partial(jax.jit, donate_argnames="state")
def release(state, idle_b) -> dict:
    return {**state, "active": state["active"] & ~idle_b}
