"""The sampling engine: a fixed set of slots, each of which holds one answer in the making.

Several prompts are packed into one row and prefilled once; their keys and values are copied to the
slots of their answers. All slots then advance together, one token per step, in a compiled loop. A
slot whose answer has ended is given the next answer. The cache and the rest of the slots' state
stay on the device, donated from call to call. The cache is only as long as the longest answer in
the making needs, and when no more prompts wait, the last answers are gathered into fewer slots.
Both sizes take a few fixed values, each compiled once.

Randomness is a function of (seed, prompt_id, answer index, token position) alone, so an answer does
not depend on the slots, the order of the prompts, or a restart. Arithmetic may depend on the first
two: a matrix product of another shape rounds differently. If a draw falls within that rounding of
the border between two tokens, the answer continues differently from there. A restart changes no
bit: the rows of prompts are cut from all prompts, answered or not, and the bits of a product's row
depend neither on the other rows nor, down to `fewest_slots` rows, on how many there are.

Axis letters: b slot, g answer that starts, p prompt of a row, t index in a row of prompts, s cache
position, v vocabulary.
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np

from model import decoder, kv_cache
from model.config import DecoderConfig
from model.packing import coarse_bucket
from model.prompt_rows import PREFILL_PROMPTS, Row, rows_of
from sharding.errors import UserError
from sharding.mesh import constrain

STEPS_PER_CALL = 32  # the most decode steps before the host looks at the answers


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave every
    token."""

    n: int = 5
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self):
        for name, ok, rule in (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("stop_strings", all(self.stop_strings), "not empty"),
        ):
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)!r}: it must be {rule}")


@dataclasses.dataclass
class Answer:
    """One answer to a prompt. `logprob` is under the model itself: temperature 1, no filter."""

    text: str
    token_ids: list[int]  # without EOS; they end before a stop string
    end_token_id: int | None  # the EOS that was drawn, if finish_reason is "stop"
    logprob: float  # summed over token_ids and the EOS that was drawn
    finish_reason: str  # "stop" (an EOS was drawn), "length" (the limit is reached), "stop_string"


# ----------------------------------------------------------------------------- drawing


def draw(logits_bv: jax.Array, uniform_b: jax.Array, sampling: Sampling):
    """One token per row by inverse CDF: (tokens int32 [b], their unfiltered log-probs fp32 [b]).

    logits_bv: fp32; uniform_b: fp32 in [0, 1). Filters in transformers' order: temperature, top-k,
    top-p, min-p (generation/logits_process.py).
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
    if sampling.min_p > 0:  # of the likeliest token's probability, whose weight is 1
        weights_bv = jnp.where(weights_bv >= sampling.min_p, weights_bv, 0.0)
    return weights_bv


def _keep_top_p(weights_bv: jax.Array, top_p: float, head: int = 128) -> jax.Array:
    """Keep a token if all likelier tokens together have less than top_p of the mass.

    In most rows the smallest kept weight is among the `head` largest; in the others bisection finds
    it, a few rows at a time. Both are exact, and cost a fraction of sorting the vocabulary. Equal
    weights are kept or dropped together.
    """
    b, v = weights_bv.shape
    limit_b = top_p * jnp.sum(weights_bv, axis=-1)
    head_bk = jax.lax.top_k(weights_bv, min(head, v))[0]
    above_bk = jnp.cumsum(head_bk, axis=-1) - head_bk
    smallest_b = jnp.min(jnp.where(above_bk < limit_b[:, None], head_bk, jnp.inf), axis=-1)
    open_b = above_bk[:, -1] < limit_b

    def bisect(carry):
        open_b, smallest_b = carry
        rows = jnp.nonzero(open_b, size=min(8, b), fill_value=b)[0]  # b: no row
        smallest = _bisect_top_p(
            weights_bv.at[rows].get(mode="clip"), limit_b.at[rows].get(mode="clip")
        )
        smallest_b = smallest_b.at[rows].set(smallest, mode="drop")
        return open_b.at[rows].set(False, mode="drop"), smallest_b

    _, smallest_b = jax.lax.while_loop(lambda c: jnp.any(c[0]), bisect, (open_b, smallest_b))
    return jnp.where(weights_bv >= smallest_b[:, None], weights_bv, 0.0)


def _bisect_top_p(weights_bv: jax.Array, limit_b: jax.Array) -> jax.Array:
    """The smallest weight for which all larger weights sum to less than the limit. Bisection over
    the bits: non-negative floats are ordered as their bits are."""
    bits_bv = jax.lax.bitcast_convert_type(weights_bv, jnp.int32)

    def halve(_, bounds):
        # The weights above high sum to less than the limit, those above low do not (or low is -1).
        low_b, high_b = bounds
        middle_b = low_b + (high_b - low_b) // 2
        above_b = jnp.sum(jnp.where(bits_bv > middle_b[:, None], weights_bv, 0.0), axis=-1)
        kept_b = above_b < limit_b
        return jnp.where(kept_b, low_b, middle_b), jnp.where(kept_b, middle_b, high_b)

    top_b = jnp.max(bits_bv, axis=-1)
    _, high_b = jax.lax.fori_loop(0, 31, halve, (jnp.full_like(top_b, -1), top_b))
    return jax.lax.bitcast_convert_type(high_b, jnp.float32)


def _inverse_cdf(weights_bv: jax.Array, uniform_b: jax.Array, block: int = 256) -> jax.Array:
    """The token at which the running sum of the weights passes uniform · total.

    In two levels, first over the sums of blocks, then within one block: five times faster on CPU
    than one cumsum over the vocabulary, and more exact.
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
    """The first index whose running sum exceeds the target. If rounding leaves none: the last index
    that added anything, so that a filtered token is never drawn."""
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


@dataclasses.dataclass
class Group:
    """Answers to one prompt that start together."""

    row: Row
    prompt: int  # which of the row
    indices: range


@dataclasses.dataclass
class Making:
    """An answer in the making."""

    prompt_id: str
    index: int
    prompt_length: int
    steps: int = 1  # tokens drawn


def fewest_slots(config: DecoderConfig, slots: int) -> int:
    """How many slots the last answers must keep so that no bit of theirs changes: measured on a CPU
    with jax 0.10, where small products take other paths."""
    sizes = (
        config.hidden_size,
        config.intermediate_size,
        config.head_dim * config.num_attention_heads,
    )
    return min(slots, 48) if min(sizes) >= 512 else slots


class Sampler:
    """Draws answers for a stream of prompts.

        sampler = Sampler(config, params, decode_text, sampling, slots=64, longest_prompt=300)
        for prompt_id, answers in sampler.run(prompts): …

    params: stacked, in any dtype; they are unstacked here, so the caller must drop them. A prompt's
    answers come when the last of them has ended, so prompts come in no fixed order.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: decoder.Params,
        decode_text: Callable[[list[int]], str],
        sampling: Sampling,
        slots: int,
        longest_prompt: int,
        dtype=jnp.float32,
    ):
        self.config, self.sampling, self.decode_text = config, sampling, decode_text
        self.params = kv_cache.unstack_layers(params)
        self.slots, self.dtype = slots, dtype
        self.group = min(sampling.n, slots)  # answers that share one prefill
        self.longest_prompt = longest_prompt
        # In positions: a multiple of 16, since odd sizes are a tenth slower on CPU.
        self.longest = -(-(longest_prompt + sampling.max_new_tokens) // 16) * 16
        self.fewest = fewest_slots(config, slots)
        self.tokens_drawn = 0  # in finished answers, without EOS
        self._logits = jax.jit(partial(decoder.logits, config=config))
        self._admit = jax.jit(partial(_admit, config=config, sampling=sampling), donate_argnums=0)
        self._advance = jax.jit(
            partial(_advance, config=config, sampling=sampling, dtype=dtype), donate_argnums=1
        )
        self._release = jax.jit(_release, donate_argnums=0)

    def run(
        self,
        prompts: Iterable[tuple[str, list[int]]],
        each_call: Callable[[], None] = lambda: None,
        answered: Collection[str] = (),
    ) -> Iterator[tuple[str, list[Answer]]]:
        """(prompt_id, its n answers in order of their index) for each (prompt_id, token ids) whose
        prompt_id is not in `answered`. (Those still decide which prompts share a row.)

        `each_call` runs between two calls of the device; it may raise to stop the run.
        """
        groups = self._groups(prompts, answered)
        waiting = deque(next(groups, ()))
        self.rows = self.slots
        self.length = self._cache_length(self.longest_prompt + STEPS_PER_CALL)
        self.state = _empty(self.config, self.rows, self.length, self.sampling, self.dtype)
        self.doing: dict[int, Making] = {}  # slot → its answer
        done: dict[str, dict[int, Answer]] = {}  # prompt_id → index → answer
        while True:
            while count := self._how_many_fit(waiting):
                self._start([waiting.popleft() for _ in range(count)])
                waiting = waiting or deque(next(groups, ()))
            if not self.doing:
                return
            each_call()
            self._fit(more=bool(waiting))
            # The call ends as soon as the waiting group fits, or half of the slots are idle.
            if waiting:
                look = self.rows - len(waiting[0].indices)
            else:
                look = self._fewer() if self._fewer() < self.rows else 0
            self.state = self._advance(self.params, self.state, look)
            for prompt_id, index, answer in self._ended():
                done.setdefault(prompt_id, {})[index] = answer
                self.tokens_drawn += len(answer.token_ids)
                if len(done[prompt_id]) == self.sampling.n:
                    answers = done.pop(prompt_id)
                    yield prompt_id, [answers[i] for i in range(self.sampling.n)]

    def _groups(self, prompts, answered) -> Iterator[list[Group]]:
        """The groups of each row of prompts, those that are answered left out."""
        for row in rows_of(prompts, self.longest_prompt):
            groups = [
                Group(row, number, range(start, min(start + self.group, self.sampling.n)))
                for number, (prompt_id, _) in enumerate(row.prompts)
                if prompt_id not in answered
                for start in range(0, self.sampling.n, self.group)
            ]
            if groups:
                yield groups

    def _how_many_fit(self, waiting: deque[Group]) -> int:
        """How many of the waiting groups can start now: 8, 4, 2, 1 or none."""
        count, free = PREFILL_PROMPTS, self.rows - len(self.doing)
        while count > len(waiting) or sum(len(g.indices) for g in islice(waiting, count)) > free:
            count //= 2
        return count

    def _start(self, groups: list[Group]) -> None:
        """Prefill the groups' row of prompts, unless it was; copy each group's prompt into one free
        slot per answer, and draw the answers' first tokens."""
        row, count = groups[0].row, self.group * len(groups)
        starting = {
            "slots": np.full(count, self.rows, np.int32),  # beyond the last slot: not written
            "prompts": np.zeros(count, np.int32),
            "keys": np.zeros((count, 2), np.uint32),
        }
        free = [slot for slot in range(self.rows) if slot not in self.doing]
        for number, group in enumerate(groups):
            prompt_id, token_ids = row.prompts[group.prompt]
            for g, index in enumerate(group.indices, number * self.group):
                slot = free.pop()
                self.doing[slot] = Making(prompt_id, index, len(token_ids))
                starting["slots"][g], starting["prompts"][g] = slot, group.prompt
                starting["keys"][g] = answer_key(self.sampling.seed, prompt_id, index)
        starting["lengths"] = row.lengths[starting["prompts"]]
        needed = self._cache_length(int(max(starting["lengths"])))
        if self.length < needed:
            self._resize(needed)
        if row.cache is None:
            hidden_1td, row.cache = _prefill(self.params, self.config, row.arrays, self.dtype)
            hidden_pd = _last_hidden(hidden_1td, row.starts + row.lengths - 1)
            row.logits_pv = self._logits(self.params, hidden=hidden_pd)
        cache, starts_g = self.state.pop("cache"), row.starts[starting["prompts"]]
        for i, kv in enumerate(row.cache):
            cache[i] = _copy_prompts(*cache[i], *kv, starting["slots"], starts_g)
        self.state = self._admit(self.state, row.logits_pv, starting)
        self.state["cache"] = cache

    # ------------------------------------------------------------ the sizes of the state

    def _cache_length(self, needed: int) -> int:
        # Below 128, compiling another length costs more than it saves.
        return min(max(128, coarse_bucket(needed)), self.longest)

    def _fewer(self) -> int:
        """The next smaller number of slots (two at most), or that of now."""
        may = self.rows > max(self.fewest, self.slots // 4)
        return max(self.fewest, self.rows // 2) if may else self.rows

    def _fit(self, more: bool) -> None:
        """Make the cache long enough for the next call, or shorter if that halves it. When no more
        prompts wait and fewer slots suffice, keep these."""
        limit = self.sampling.max_new_tokens
        ends = (m.prompt_length + min(m.steps + STEPS_PER_CALL, limit) for m in self.doing.values())
        length, rows = self._cache_length(max(ends)), self.rows
        if not more and len(self.doing) <= self._fewer():
            rows = self._fewer()
        if rows < self.rows:
            live = sorted(self.doing)
            idle = [slot for slot in range(self.rows) if slot not in self.doing]
            self._resize(length, live + idle[: rows - len(live)])
            self.doing = {new: self.doing[old] for new, old in enumerate(live)}
        elif not self.length // 2 < length <= self.length:
            self._resize(length)

    def _resize(self, length: int, slots: list[int] | None = None) -> None:
        """Set the cache's length, and keep only these slots (None: all)."""
        if slots is not None:
            slots = np.array(slots)
            rest = {name: x[slots] for name, x in self.state.items() if name != "cache"}
            self.state = rest | {"cache": self.state["cache"]}
            self.rows = len(slots)
        cache = self.state["cache"]
        for i in range(len(cache)):  # one layer at a time, so that only one exists twice
            cache[i] = _resize_layer(*cache[i], slots, length)
        self.length = length

    # ---------------------------------------------------------------------- the answers

    def _ended(self) -> list[tuple[str, int, Answer]]:
        """(prompt_id, index, answer) of the answers that have ended since the last look."""
        names = ("active", "steps", "tokens", "logprobs")
        active, steps, tokens, logprobs = jax.device_get([self.state[n] for n in names])
        ended, stopped = [], np.zeros(self.rows, bool)
        for slot, making in list(self.doing.items()):
            making.steps = int(steps[slot])
            drawn, scores = tokens[slot, : making.steps].tolist(), logprobs[slot, : making.steps]
            end = drawn[-1] if drawn[-1] in self.config.eos_token_ids else None
            token_ids = drawn if end is None else drawn[:-1]
            answer = self._cut_at_stop_string(token_ids, scores)
            stopped[slot] = answer is not None
            if answer is None and not active[slot]:
                reason, score = "length" if end is None else "stop", float(np.sum(scores))
                answer = Answer(self.decode_text(token_ids), token_ids, end, score, reason)
            if answer is not None:
                ended.append((making.prompt_id, making.index, answer))
                del self.doing[slot]
        if stopped.any():
            self.state = self._release(self.state, stopped)
        return ended

    def _cut_at_stop_string(self, token_ids: list[int], scores) -> Answer | None:
        """The answer up to its first stop string; None if it has none. The text ends right before
        the string, the tokens before the token in which the string begins."""
        if not self.sampling.stop_strings:
            return None
        text = self.decode_text(token_ids)
        places = [i for i in map(text.find, self.sampling.stop_strings) if i >= 0]
        if not places:
            return None
        text = text[: min(places)]
        kept = len(token_ids)
        while kept and not text.startswith(self.decode_text(token_ids[:kept])):
            kept -= 1
        return Answer(text, token_ids[:kept], None, float(np.sum(scores[:kept])), "stop_string")


# ------------------------------------------------------------- what runs on the device


def programs(config: DecoderConfig, sampling: Sampling, dtype=jnp.float32):
    """The programs of a Sampler, to be measured by themselves. params: unstacked.

    `empty(slots, length)`: the state of idle slots. `advance(params, state, stop_at_active)`: up to
    STEPS_PER_CALL tokens in each active slot; donates the state. `prefill(params, row)`.
    """
    advance = partial(_advance, config=config, sampling=sampling, dtype=dtype)
    return (
        lambda slots, length: _empty(config, slots, length, sampling, dtype),
        jax.jit(advance, donate_argnums=1),
        lambda params, row: _prefill(params, config, row, dtype),
    )


def _empty(config: DecoderConfig, slots: int, length: int, sampling: Sampling, dtype) -> dict:
    """The state of all slots, none of them in use. `tokens` and `logprobs` include EOS."""
    # numpy arrays are the same on every process, whatever devices the mesh has.
    return {
        "cache": kv_cache.empty_cache(config, slots, length, dtype),
        "active": np.zeros(slots, bool),
        "keys": np.zeros((slots, 2), np.uint32),
        "prompt_lengths": np.zeros(slots, np.int32),
        "steps": np.zeros(slots, np.int32),  # tokens drawn
        "tokens": np.zeros((slots, sampling.max_new_tokens), np.int32),
        "logprobs": np.zeros((slots, sampling.max_new_tokens), np.float32),
    }


def arrays_held(config: DecoderConfig, mesh, slots: int, length: int, dtype=jnp.float32) -> dict:
    """{title: arrays} that a sampler holds, as shapes with their shardings: parameters in the dtype
    of computation, and a cache of `slots` rows with `length` positions each."""
    keys, values = zip(*kv_cache.abstract_cache(config, mesh, slots, length, dtype))
    return {
        "parameters": decoder.abstract(config, mesh, dtype),
        "cache": {"keys": list(keys), "values": list(values)},
    }


def _replicated(state: dict) -> dict:
    """The state, all but the cache whole on every device, since the host reads it."""
    rest = {name: x for name, x in state.items() if name != "cache"}
    return state | {name: constrain(x, *[None] * x.ndim) for name, x in rest.items()}


def _prefill(params, config: DecoderConfig, row, dtype):
    """(hidden states [1, t, d] of a row of prompts, the keys and values of each layer)."""
    same_1tt = row["prompts"][:, :, None] == row["prompts"][:, None, :]
    return kv_cache.prefill(params, config, row["tokens"], row["positions"], same_1tt, dtype)


@partial(jax.jit, donate_argnums=(0, 1))
def _copy_prompts(k_bkhs, v_bksh, prompts_k, prompts_v, slots_g, starts_g):
    """One layer's cache after the prompts at `starts_g` of their row were copied to `slots_g` (a
    slot beyond the last is not written). Called layer by layer, so that one layer is compiled."""
    # The tokens behind a prompt are copied too; they are overwritten before they are read.
    from_gs = starts_g[:, None] + jnp.arange(k_bkhs.shape[-1])
    from_gs = jnp.minimum(from_gs, prompts_k.shape[-1] - 1)
    new_k = jnp.moveaxis(prompts_k[0][:, :, from_gs], 2, 0)
    new_v = jnp.moveaxis(prompts_v[0][:, from_gs], 1, 0)
    return kv_cache.constrain_cache(
        k_bkhs.at[slots_g].set(new_k, mode="drop"), v_bksh.at[slots_g].set(new_v, mode="drop")
    )


@jax.jit
def _last_hidden(hidden_1td, ends_p):
    """The hidden states of the prompts' last tokens."""
    return hidden_1td[0, ends_p]


def _admit(state, logits_pv, starting, *, config, sampling) -> dict:
    """The state (without the cache) after the first tokens of the starting answers are drawn.
    logits_pv: at their prompts' last tokens."""
    slots_g, lengths_g = starting["slots"], starting["lengths"]
    logits_gv = logits_pv[starting["prompts"]]
    first_g = jnp.zeros_like(slots_g)
    tokens_g, logprobs_g = draw(logits_gv, uniforms(starting["keys"], first_g), sampling)
    active_g = ~_is_eos(tokens_g, config) & (sampling.max_new_tokens > 1)
    new = {
        "active": active_g,
        "keys": starting["keys"],
        "prompt_lengths": lengths_g,
        "steps": jnp.ones_like(slots_g),
    }
    state = state | {
        name: state[name].at[slots_g].set(value, mode="drop") for name, value in new.items()
    }
    state["tokens"] = state["tokens"].at[slots_g, 0].set(tokens_g, mode="drop")
    state["logprobs"] = state["logprobs"].at[slots_g, 0].set(logprobs_g, mode="drop")
    return _replicated(state)


def _advance(params, state, stop_at_active, *, config, sampling, dtype) -> dict:
    """Draw tokens in all active slots until at most `stop_at_active` of them are left, or
    STEPS_PER_CALL times."""
    rows = jnp.arange(state["steps"].shape[0])

    def unfinished(carry):
        i, state = carry
        return (i < STEPS_PER_CALL) & (jnp.sum(state["active"]) > stop_at_active)

    def step(carry):
        i, state = carry
        steps_b, active_b = state["steps"], state["active"]
        last_b = state["tokens"][rows, steps_b - 1]
        positions_b = state["prompt_lengths"] + steps_b - 1
        hidden_bd, cache = kv_cache.decode(
            params, config, state["cache"], last_b, positions_b, dtype
        )
        logits_bv = decoder.logits(params, config, hidden_bd)
        tokens_b, logprobs_b = draw(logits_bv, uniforms(state["keys"], steps_b), sampling)
        at_b = jnp.where(active_b, steps_b, sampling.max_new_tokens)  # beyond: not written
        steps_b = steps_b + active_b
        return i + 1, {
            **state,
            "cache": cache,
            "tokens": state["tokens"].at[rows, at_b].set(tokens_b, mode="drop"),
            "logprobs": state["logprobs"].at[rows, at_b].set(logprobs_b, mode="drop"),
            "steps": steps_b,
            "active": active_b & ~_is_eos(tokens_b, config) & (steps_b < sampling.max_new_tokens),
        }

    return _replicated(jax.lax.while_loop(unfinished, step, (0, state))[1])


@partial(jax.jit, static_argnames="length")
def _resize_layer(k_bkhs, v_bksh, slots_b, length):
    """One layer's cache for these slots (None: all), cut or padded to `length` positions."""
    if slots_b is not None:
        k_bkhs, v_bksh = k_bkhs[slots_b], v_bksh[slots_b]
    extra = max(length - k_bkhs.shape[-1], 0)
    return kv_cache.constrain_cache(
        jnp.pad(k_bkhs[..., :length], ((0, 0),) * 3 + ((0, extra),)),
        jnp.pad(v_bksh[:, :, :length], ((0, 0), (0, 0), (0, extra), (0, 0))),
    )


def _release(state, mask_b) -> dict:
    return {**state, "active": state["active"] & ~mask_b}


def _is_eos(tokens: jax.Array, config: DecoderConfig) -> jax.Array:
    return jnp.isin(tokens, jnp.array(config.eos_token_ids, jnp.int32))
