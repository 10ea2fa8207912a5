"""The sampling engine: a fixed set of slots, each holding one answer in the making.

A prompt is prefilled once and its keys and values are copied to the slots of its answers; all
slots then advance together, one token a step, in a compiled loop; a slot whose answer has ended is
given the next one. The cache and everything else a slot needs stay on the device, donated from
call to call.

Randomness is a function of (seed, prompt_id, answer index, token position) alone, so an answer does
not depend on the slots, the order of the prompts, or a restart. (The arithmetic may: a matrix
product of another shape rounds differently, and where a draw falls within that rounding of the
border between two tokens, the answer goes another way from there on.)

Axis letters: b slot, g answers of one prompt, t prompt position, m answer position, v vocabulary.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model import mistral
from model.config import MistralConfig
from model.packing import bucket

STEPS_A_CALL = 32  # decode steps between two looks of the host, at most


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 is greedy; top_k 0 and top_p 1 leave every token."""

    n: int = 5
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int = 0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self):
        for name, ok, rule in (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("stop_strings", all(self.stop_strings), "not empty"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {rule}")


@dataclasses.dataclass
class Answer:
    """`token_ids` hold no EOS and end before a stop string; `logprob` is their sum under the model
    itself (temperature 1, nothing filtered), plus EOS's where finish_reason is "stop"."""

    text: str
    token_ids: list[int]
    logprob: float
    finish_reason: str  # "stop": the model ended; "length": the limit did; "stop_string"


# ----------------------------------------------------------------------------- drawing


def draw(logits_bv: jax.Array, uniform_b: jax.Array, sampling: Sampling):
    """One token a row by inverse CDF: (tokens int32 [b], the whole model's log-probs fp32 [b]).

    logits_bv: fp32; uniform_b: fp32 in [0, 1). Filters in transformers' order: temperature, top-k,
    top-p (generation/logits_process.py).
    """
    with jax.named_scope("draw"):
        if sampling.temperature == 0:
            tokens_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        else:
            weights_bv = filtered_weights(logits_bv, sampling)
            tokens_b = _inverse_cdf(weights_bv, uniform_b)
        chosen_b = jnp.take_along_axis(logits_bv, tokens_b[:, None], axis=-1)[:, 0]
        return tokens_b, chosen_b - jax.nn.logsumexp(logits_bv, axis=-1)


def filtered_weights(logits_bv: jax.Array, sampling: Sampling) -> jax.Array:
    """Unnormalised probabilities [b, v]: 1 at the likeliest token, 0 where filtered out."""
    scaled_bv = logits_bv / sampling.temperature
    weights_bv = jnp.exp(scaled_bv - jnp.max(scaled_bv, axis=-1, keepdims=True))
    if 0 < sampling.top_k < logits_bv.shape[-1]:
        kth_b1 = jax.lax.top_k(weights_bv, sampling.top_k)[0][:, -1:]
        weights_bv = jnp.where(weights_bv >= kth_b1, weights_bv, 0.0)
    if sampling.top_p < 1:
        weights_bv = _keep_top_p(weights_bv, sampling.top_p)
    return weights_bv


def _keep_top_p(weights_bv: jax.Array, top_p: float, head: int = 128) -> jax.Array:
    """Keep the tokens before which less than top_p of the mass lies, in descending order.

    A token is kept if the mass of all likelier ones is below top_p. Mostly the smallest kept
    weight is among the `head` largest; otherwise it is found by bisection. Both are exact, and
    cost a fraction of sorting the vocabulary. Equal weights are kept or dropped together.
    """
    limit_b = top_p * jnp.sum(weights_bv, axis=-1)
    head_bk = jax.lax.top_k(weights_bv, min(head, weights_bv.shape[-1]))[0]
    above_bk = jnp.cumsum(head_bk, axis=-1) - head_bk
    smallest_b = jax.lax.cond(
        jnp.all(above_bk[:, -1] >= limit_b),
        lambda: jnp.min(jnp.where(above_bk < limit_b[:, None], head_bk, jnp.inf), axis=-1),
        lambda: _bisect_top_p(weights_bv, limit_b),
    )
    return jnp.where(weights_bv >= smallest_b[:, None], weights_bv, 0.0)


def _bisect_top_p(weights_bv: jax.Array, limit_b: jax.Array) -> jax.Array:
    """The smallest weight whose likelier tokens' mass is below the limit: bisection over the bits
    of the float, since non-negative floats order as their bits do."""
    bits_bv = jax.lax.bitcast_convert_type(weights_bv, jnp.int32)

    def halve(_, bounds):
        low_b, high_b = bounds  # high's mass above is below the limit, low's is not (or low is -1)
        middle_b = low_b + (high_b - low_b) // 2
        above_b = jnp.sum(jnp.where(bits_bv > middle_b[:, None], weights_bv, 0.0), axis=-1)
        kept_b = above_b < limit_b
        return jnp.where(kept_b, low_b, middle_b), jnp.where(kept_b, middle_b, high_b)

    top_b = jnp.max(bits_bv, axis=-1)
    _, high_b = jax.lax.fori_loop(0, 31, halve, (jnp.full_like(top_b, -1), top_b))
    return jax.lax.bitcast_convert_type(high_b, jnp.float32)


def _inverse_cdf(weights_bv: jax.Array, uniform_b: jax.Array, block: int = 256) -> jax.Array:
    """The token at which the running sum of the weights passes uniform · total.

    In two levels, sums of blocks and then within one block: five times faster on CPU than one
    cumsum over the vocabulary, and more exact.
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
    """First index whose running sum exceeds the target; where rounding leaves none, the last one
    that added anything, so that a filtered token can never be drawn."""
    index_b = jnp.sum(sums_bi <= target_b1, axis=-1)
    last_b = jnp.sum(sums_bi < sums_bi[:, -1:], axis=-1)
    return jnp.minimum(index_b, last_b)


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


# ----------------------------------------------------------------------------- the engine


class Sampler:
    """Draws answers for a stream of prompts.

        sampler = Sampler(config, params, decode_text, sampling, slots=64, longest_prompt=300)
        for prompt_id, answers in sampler.run(prompts): …

    params: stacked, in any dtype; they are taken apart here, so the caller lets go of them.
    Answers come when the last one of a prompt has ended, so in no fixed order.
    """

    def __init__(
        self,
        config: MistralConfig,
        params: mistral.Params,
        decode_text: Callable[[list[int]], str],
        sampling: Sampling,
        slots: int,
        longest_prompt: int,
        dtype=jnp.float32,
    ):
        self.config, self.sampling, self.decode_text = config, sampling, decode_text
        self.params = mistral.unstack_layers(params)
        self.slots = slots
        self.group = min(sampling.n, slots)  # answers that share one prefill
        self.longest_prompt = longest_prompt
        self.length = max(bucket(longest_prompt), longest_prompt + sampling.max_new_tokens)
        self.tokens_drawn = 0  # of the answers given out, EOS not counted
        self._admit = jax.jit(
            partial(_admit, config=config, sampling=sampling, dtype=dtype), donate_argnums=1
        )
        self._advance = jax.jit(
            partial(_advance, config=config, sampling=sampling, dtype=dtype), donate_argnums=1
        )
        self._release = jax.jit(_release, donate_argnums=0)
        self.state = jax.jit(partial(_empty, config, slots, self.length, sampling, dtype))()

    def run(
        self,
        prompts: Iterable[tuple[str, list[int]]],
        each_call: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[str, list[Answer]]]:
        """(prompt_id, its n answers in order of their index) for each (prompt_id, token ids).

        `each_call` runs between two calls of the device; it may raise to stop the run.
        """
        groups = self._groups(prompts)
        waiting = next(groups, None)
        doing: dict[int, tuple[str, int]] = {}  # slot → (prompt_id, answer index)
        done: dict[str, dict[int, Answer]] = {}  # prompt_id → index → answer
        free = list(range(self.slots))
        while True:
            while waiting is not None and len(free) >= len(waiting[2]):
                prompt_id, token_ids, indices = waiting
                slots = [free.pop() for _ in indices]
                self._start(prompt_id, token_ids, slots, indices)
                doing |= {slot: (prompt_id, index) for slot, index in zip(slots, indices)}
                done.setdefault(prompt_id, {})
                waiting = next(groups, None)
            if not doing:
                return
            # Look at the slots again as soon as the waiting group fits.
            wanted = self.slots if waiting is None else len(waiting[2])
            each_call()
            self.state = self._advance(self.params, self.state, self.slots - wanted)
            for slot, answer in self._ended(doing):
                prompt_id, index = doing.pop(slot)
                free.append(slot)
                done[prompt_id][index] = answer
                self.tokens_drawn += len(answer.token_ids)
                if len(done[prompt_id]) == self.sampling.n:
                    answers = done.pop(prompt_id)
                    yield prompt_id, [answers[i] for i in range(self.sampling.n)]

    def _groups(self, prompts):
        """Cut each prompt's answers into groups that fit the slots."""
        for prompt_id, token_ids in prompts:
            for start in range(0, self.sampling.n, self.group):
                indices = range(start, min(start + self.group, self.sampling.n))
                yield prompt_id, token_ids, indices

    def _start(self, prompt_id: str, token_ids: list[int], slots: list[int], indices):
        """Prefill a prompt into the slots of its answers and draw their first tokens."""
        length = len(token_ids)
        if length > self.longest_prompt:
            raise ValueError(
                f"a prompt of {length} tokens: longest_prompt is {self.longest_prompt}"
            )
        tokens_1t = np.zeros((1, bucket(length)), np.int32)
        tokens_1t[0, :length] = token_ids
        spare = [self.slots] * (self.group - len(slots))  # beyond the last slot: written nowhere
        keys = [answer_key(self.sampling.seed, prompt_id, i) for i in indices]
        keys += [np.zeros(2, np.uint32)] * len(spare)
        slots_g = np.array(slots + spare, np.int32)
        self.state = self._admit(
            self.params, self.state, tokens_1t, length, slots_g, np.stack(keys)
        )

    def _ended(self, doing: dict) -> list[tuple[int, Answer]]:
        """The answers that have ended since the last look."""
        names = ("active", "steps", "tokens", "logprobs")
        active, steps, tokens, logprobs = jax.device_get([self.state[n] for n in names])
        ended, stopped = [], []
        for slot in doing:
            drawn, scores = tokens[slot, : steps[slot]].tolist(), logprobs[slot, : steps[slot]]
            answer = self._cut_at_stop_string(drawn, scores)
            if answer is not None:
                stopped.append(slot)
            elif not active[slot]:
                answer = self._answer(drawn, scores)
            if answer is not None:
                ended.append((slot, answer))
        if stopped:
            mask_b = np.zeros(self.slots, bool)
            mask_b[stopped] = True
            self.state = self._release(self.state, mask_b)
        return ended

    def _answer(self, drawn: list[int], scores) -> Answer:
        stop = drawn[-1] in self.config.eos_token_ids
        token_ids = drawn[:-1] if stop else drawn
        reason = "stop" if stop else "length"
        return Answer(self.decode_text(token_ids), token_ids, float(np.sum(scores)), reason)

    def _cut_at_stop_string(self, drawn: list[int], scores) -> Answer | None:
        """The answer up to the first stop string in it. The text ends right before the string,
        the tokens before the one in which it begins."""
        if not self.sampling.stop_strings:
            return None
        token_ids = drawn[:-1] if drawn[-1] in self.config.eos_token_ids else drawn
        text = self.decode_text(token_ids)
        found = [i for i in map(text.find, self.sampling.stop_strings) if i >= 0]
        if not found:
            return None
        text = text[: min(found)]
        kept = len(token_ids)
        while kept and not text.startswith(self.decode_text(token_ids[:kept])):
            kept -= 1
        return Answer(text, token_ids[:kept], float(np.sum(scores[:kept])), "stop_string")


# ------------------------------------------------------------- what runs on the device


def _empty(config: MistralConfig, slots: int, length: int, sampling: Sampling, dtype) -> dict:
    """The state of all slots, none in use. `tokens`, `logprobs`: drawn so far, EOS included."""
    return {
        "cache": mistral.empty_cache(config, slots, length, dtype),
        "active": jnp.zeros(slots, bool),
        "keys": jnp.zeros((slots, 2), jnp.uint32),
        "prompt_lengths": jnp.zeros(slots, jnp.int32),
        "steps": jnp.zeros(slots, jnp.int32),  # tokens drawn
        "tokens": jnp.zeros((slots, sampling.max_new_tokens), jnp.int32),
        "logprobs": jnp.zeros((slots, sampling.max_new_tokens), jnp.float32),
    }


def _admit(params, state, tokens_1t, length, slots_g, keys_g2, *, config, sampling, dtype) -> dict:
    """Prefill one prompt and start an answer in each of `slots_g` (those beyond the last: none)."""
    hidden_1td, prompt_cache = mistral.prefill(params, config, tokens_1t, dtype)
    last_1d = jax.lax.dynamic_index_in_dim(hidden_1td, length - 1, axis=1, keepdims=False)
    g, t = slots_g.shape[0], tokens_1t.shape[1]
    logits_gv = jnp.broadcast_to(mistral.logits(params, config, last_1d), (g, config.vocab_size))
    first_g = jnp.zeros(g, jnp.int32)
    tokens_g, logprobs_g = draw(logits_gv, uniforms(keys_g2, first_g), sampling)
    cache = [
        (k.at[slots_g, :, :, :t].set(pk, mode="drop"), v.at[slots_g, :, :t].set(pv, mode="drop"))
        for (k, v), (pk, pv) in zip(state["cache"], prompt_cache)
    ]
    active_g = ~_is_eos(tokens_g, config) & (sampling.max_new_tokens > 1)
    new = {
        "active": active_g,
        "keys": keys_g2,
        "prompt_lengths": jnp.full(g, length),
        "steps": jnp.ones(g, jnp.int32),
    }
    state = {**state, "cache": cache} | {
        name: state[name].at[slots_g].set(value, mode="drop") for name, value in new.items()
    }
    state["tokens"] = state["tokens"].at[slots_g, 0].set(tokens_g, mode="drop")
    state["logprobs"] = state["logprobs"].at[slots_g, 0].set(logprobs_g, mode="drop")
    return state


def _advance(params, state, stop_at_active, *, config, sampling, dtype) -> dict:
    """Draw tokens in every active slot until no more than `stop_at_active` of them are left, or
    STEPS_A_CALL times."""
    rows = jnp.arange(state["steps"].shape[0])

    def unfinished(carry):
        i, state = carry
        return (i < STEPS_A_CALL) & (jnp.sum(state["active"]) > stop_at_active)

    def step(carry):
        i, state = carry
        steps_b, active_b = state["steps"], state["active"]
        last_b = state["tokens"][rows, steps_b - 1]
        positions_b = state["prompt_lengths"] + steps_b - 1
        hidden_bd, cache = mistral.decode(
            params, config, state["cache"], last_b, positions_b, dtype
        )
        logits_bv = mistral.logits(params, config, hidden_bd)
        tokens_b, logprobs_b = draw(logits_bv, uniforms(state["keys"], steps_b), sampling)
        at_b = jnp.where(active_b, steps_b, sampling.max_new_tokens)  # beyond: written nowhere
        steps_b = steps_b + active_b
        return i + 1, {
            **state,
            "cache": cache,
            "tokens": state["tokens"].at[rows, at_b].set(tokens_b, mode="drop"),
            "logprobs": state["logprobs"].at[rows, at_b].set(logprobs_b, mode="drop"),
            "steps": steps_b,
            "active": active_b & ~_is_eos(tokens_b, config) & (steps_b < sampling.max_new_tokens),
        }

    return jax.lax.while_loop(unfinished, step, (0, state))[1]


def _release(state, mask_b) -> dict:
    return {**state, "active": state["active"] & ~mask_b}


def _is_eos(tokens: jax.Array, config: MistralConfig) -> jax.Array:
    return jnp.isin(tokens, jnp.array(config.eos_token_ids, jnp.int32))
