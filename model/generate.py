"""The sampling engine: a fixed set of slots, each of which holds one answer in the making.

Prompts that can start at the same time are packed into one row and prefilled once; their keys and
values are copied to the slots of their answers. All slots then advance together, one token per
step, in a compiled loop. A slot whose answer has ended is given the next answer. The cache and the
rest of the slots' state stay on the device, donated from call to call; the host gets the tokens of
each call. The cache is only as long as the longest answer in the making needs, and when no more
prompts come, the last answers are gathered into fewer slots. Both sizes take a few fixed values,
each compiled once. How answers are drawn differs from slot to slot and compiles nothing.

Randomness is a function of (seed, prompt_id, answer index, token position) alone, so an answer does
not depend on the slots, the order of the prompts, or a restart. Arithmetic may depend on them: a
matrix product of another shape rounds differently. If a draw falls within that rounding of the
border between two tokens, the answer continues differently from there.

Axis letters: b slot, g answer that starts, t index in the row of prompts, s cache position, i step
of a call, v vocabulary.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np

from model import decoder, drawing, kv_cache, slot_state
from model.config import DecoderConfig
from model.packing import coarse_bucket
from model.slot_state import STEPS_PER_CALL
from sharding.errors import UserError

PREFILL_TOKENS = 512  # the most tokens in a row of several prompts; off CPU four times as many
PREFILL_PROMPTS = 8  # the most prompts in a row; a power of two: few numbers to compile


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
    ignore_eos: bool = False

    def __post_init__(self):
        for name, ok, rule in (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", 0 <= self.top_k < 2**31, "at least 0 and below 2³¹"),
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


@dataclasses.dataclass
class Event:
    """What a call brought for one answer: its new tokens, EOS included, and the answer if it has
    ended."""

    prompt_id: str
    index: int
    token_ids: list[int]
    logprobs: list[float]
    answer: Answer | None


@dataclasses.dataclass
class Group:
    """Answers to one prompt that start together and share its prefill."""

    prompt_id: str
    token_ids: list[int]
    indices: Sequence[int]
    sampling: Sampling


@dataclasses.dataclass
class Making:
    """An answer in the making."""

    prompt_id: str
    index: int
    prompt_length: int
    sampling: Sampling
    token_ids: list[int] = dataclasses.field(default_factory=list)  # drawn, EOS included
    logprobs: list[np.float32] = dataclasses.field(default_factory=list)
    told: int = 0  # tokens that an Event has brought


class Sampler:
    """Draws answers to prompts.

        sampler = Sampler(config, params, decode_text, sampling, slots=64, longest_prompt=300)
        for prompt_id, answers in sampler.run(prompts): …         # n answers to each prompt

    or answer by answer, each drawn in its own way:

        sampler.submit("a", token_ids, indices=[0, 1], sampling=Sampling(temperature=0))
        for event in sampler.events(): …                          # tokens, and answers that end

    params: stacked, in any dtype; they are unstacked here, so the caller must drop them. `sampling`
    is the default, and its max_new_tokens the most for any answer. An answer's events come in
    order, the answers in no fixed one.
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
        self.group = min(sampling.n, slots)  # answers that share one prefill, as a rule
        self.longest_prompt = longest_prompt
        # In positions: a multiple of 16, since odd sizes are a tenth slower on CPU.
        self.longest = -(-(longest_prompt + sampling.max_new_tokens) // 16) * 16
        self.tokens_drawn = 0  # in finished answers, without EOS
        self.waiting: deque[Group] = deque()
        self.doing: dict[int, Making] = {}  # slot → its answer
        self.firsts: list[
            tuple
        ] = []  # (answers, their first tokens, log-probs), still on the device
        self.rows, self.length, self.state = 0, 0, None
        self.more = True  # whether prompts may still come
        platform = jax.default_backend()
        self.on_cpu = platform == "cpu"
        how = {"config": config, "dtype": dtype}
        admit = slot_state.admit_by_parts if self.on_cpu else slot_state.admit
        self._admit = partial(admit, **how)
        self._advance = partial(
            slot_state.advance, **how, side_buffer="tpu" if platform == "tpu" else None
        )

    # ------------------------------------------------------------------ answers, one by one

    def submit(
        self,
        prompt_id: str,
        token_ids: list[int],
        indices: Sequence[int] = (0,),
        sampling: Sampling | None = None,
    ) -> None:
        """Draw these answers to a prompt, as soon as slots are free. An answer is decided by the
        sampling's seed, prompt_id and its index. ValueError: the prompt is too long."""
        sampling = sampling or self.sampling
        if len(token_ids) > self.longest_prompt:
            raise ValueError(
                f"a prompt of {len(token_ids)} tokens: longest_prompt is {self.longest_prompt}"
            )
        if sampling.max_new_tokens > self.sampling.max_new_tokens:
            raise ValueError(f"max_new_tokens is at most {self.sampling.max_new_tokens}")
        for start in range(0, len(indices), self.slots):
            some = indices[start : start + self.slots]
            self.waiting.append(Group(prompt_id, token_ids, some, sampling))

    def cancel(self, prompt_id: str, indices: Sequence[int] | None = None) -> None:
        """Forget these answers to a prompt (None: all of them). They bring no further events."""

        def is_meant(index: int) -> bool:
            return indices is None or index in indices

        for group in self.waiting:
            if group.prompt_id == prompt_id:
                group.indices = [index for index in group.indices if not is_meant(index)]
        self.waiting = deque(group for group in self.waiting if group.indices)
        self._release(
            [s for s, m in self.doing.items() if m.prompt_id == prompt_id and is_meant(m.index)]
        )

    def events(self, steps: int = STEPS_PER_CALL) -> Iterator[Event]:
        """What the answers bring, until none is left. Meanwhile more may be submitted or cancelled.
        steps: the most tokens per answer before new ones are admitted."""
        while self.waiting or self.doing:
            while self.admit():
                pass
            yield from self.advance(steps)

    # ------------------------------------------------------------------ all answers of a file

    def run(
        self, prompts: Iterable[tuple[str, list[int]]], each_call: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[str, list[Answer]]]:
        """(prompt_id, its n answers in order of their index) for each (prompt_id, token ids).

        A prompt's answers come when the last of them has ended, so prompts come in no fixed order.
        `each_call` runs between two calls of the device; it may raise to stop the run.
        """
        prompts, n = iter(prompts), self.sampling.n
        done: dict[str, dict[int, Answer]] = {}  # prompt_id → index → answer
        self.waiting.clear()
        self.doing.clear()
        self.firsts, self.rows, self.more = [], 0, True
        while True:
            while True:
                while self.more and len(self.waiting) < PREFILL_PROMPTS:
                    prompt_id, token_ids = next(prompts, (None, None))
                    self.more = prompt_id is not None
                    if self.more:
                        done[prompt_id] = {}
                        self.submit(prompt_id, token_ids, range(n))
                if not self.admit():
                    break
            if not self.doing:
                return
            each_call()
            for event in self.advance():
                if event.answer is not None:
                    done[event.prompt_id][event.index] = event.answer
                    if len(done[event.prompt_id]) == n:
                        answers = done.pop(event.prompt_id)
                        yield event.prompt_id, [answers[i] for i in range(n)]

    # ---------------------------------------------------------------------- calls of the device

    def admit(self) -> bool:
        """Prefill the first of the waiting prompts, packed into one row, copy them into one free
        slot per answer, and draw the answers' first tokens. False: none waits, or none fits."""
        if not self.doing and self.waiting and self.rows < self.slots:
            self._empty()
        groups = [self.waiting.popleft() for _ in range(self._how_many_fit())]
        if not groups:
            return False
        needed = self._cache_length(max(len(group.token_ids) for group in groups))
        if self.length < needed:
            self._resize(needed)
        row, starting, makings = self._row_of(groups)
        self.state, *first = self._admit(self.params, self.state, row, starting)
        self.firsts.append((makings, *first))
        return True

    def advance(self, steps: int = STEPS_PER_CALL) -> list[Event]:
        """Draw up to so many tokens in each slot, and tell what came. The call ends as soon as
        those that wait can be admitted, or half of the slots are idle and no more prompts come."""
        if not self.doing:
            return []
        self._fit()
        if self.waiting:
            look = self.rows - self._wanted()
        else:
            look = self.rows // 2 if self._may_halve() else 0
        self.state, drawn = self._advance(self.params, self.state, look, steps)
        return self._read(drawn)

    def _how_many_fit(self) -> int:
        """How many of the waiting groups can start now: 8, 4, 2, 1 or none."""
        count, free = PREFILL_PROMPTS, self.rows - len(self.doing)
        most = PREFILL_TOKENS * (1 if self.on_cpu else 4)
        while count:
            first = list(islice(self.waiting, count))
            fits = len(first) == count and sum(len(group.indices) for group in first) <= free
            tokens = sum(len(group.token_ids) for group in first)
            if fits and (tokens <= most or count == 1):
                return count
            count //= 2
        return 0

    def _wanted(self) -> int:
        """How many idle slots end a call while answers wait: enough for the first group. Off CPU,
        where looking costs more than a few idle slots, a sixteenth of all if so many wait."""
        wanted = 0
        for group in islice(self.waiting, PREFILL_PROMPTS):
            if wanted and (self.on_cpu or wanted + len(group.indices) > self.rows // 16):
                break
            wanted += len(group.indices)
        return wanted

    def _row_of(self, groups: list[Group]) -> tuple[dict, dict, list[Making]]:
        """(The row of prompts, where and how each answer starts, the answers) of these groups."""
        t = coarse_bucket(sum(len(group.token_ids) for group in groups))
        row = {name: np.zeros((1, t), np.int32) for name in ("tokens", "positions", "prompts")}
        largest = max(len(group.indices) for group in groups)
        if largest > self.group:  # few sizes to compile
            largest = min(2 ** (largest - 1).bit_length(), self.slots)
        starting = slot_state.nothing_starts(max(largest, self.group) * len(groups), self.rows)
        free = [slot for slot in range(self.rows) if slot not in self.doing]
        start, g, makings = 0, 0, []
        for number, group in enumerate(groups):
            length, how = len(group.token_ids), group.sampling
            here = slice(start, start + length)
            row["tokens"][0, here] = group.token_ids
            row["positions"][0, here] = np.arange(length)
            row["prompts"][0, here] = number + 1
            for index in group.indices:
                slot = free.pop()
                making = Making(group.prompt_id, index, length, how)
                makings.append(making)
                self.doing[slot] = making
                values = {"slots": slot, "starts": start, "lengths": length}
                values |= {"limits": how.max_new_tokens, "ignore_eos": how.ignore_eos}
                values["keys"] = drawing.answer_key(how.seed, group.prompt_id, index)
                for name, value in values.items():
                    starting[name][g] = value
                for name, column in starting["settings"].items():
                    column[g] = getattr(how, name)
                g += 1
            start += length
        return row, starting, makings

    # ------------------------------------------------------------ the sizes of the state

    def _empty(self) -> None:
        self.rows = self.slots
        self.length = self._cache_length(self.longest_prompt + STEPS_PER_CALL)
        self.state = slot_state.empty(self.config, self.rows, self.length, self.dtype)

    def _cache_length(self, needed: int) -> int:
        # Below 128, compiling another length costs more than it saves.
        return min(max(128, coarse_bucket(needed)), self.longest)

    def _may_halve(self) -> bool:
        return not self.more and not self.waiting and self.rows > max(1, self.slots // 4)

    def _fit(self) -> None:
        """Make the cache long enough for the next call, or shorter if that halves it. When no more
        prompts come and half of the slots are idle, halve the slots (twice at most)."""
        ends = (
            m.prompt_length
            + min(max(len(m.token_ids), 1) + STEPS_PER_CALL, m.sampling.max_new_tokens)
            for m in self.doing.values()
        )
        length, rows = self._cache_length(max(ends)), self.rows
        if self._may_halve() and len(self.doing) <= rows // 2:
            rows //= 2
        if rows < self.rows:
            live = sorted(self.doing)
            idle = [slot for slot in range(self.rows) if slot not in self.doing]
            self._resize(length, live + idle[: rows - len(live)])
            self.doing = {new: self.doing[old] for new, old in enumerate(live)}
        elif not self.length // 2 < length <= self.length:
            self._resize(length)

    def _resize(self, length: int, slots: list[int] | None = None) -> None:
        """Set the cache's length, and keep only these slots (None: all)."""
        cache = self.state.pop("cache")
        if slots is not None:
            slots = np.array(slots)
            self.state = jax.tree.map(lambda x: x[slots], self.state)
            self.rows = len(slots)
        for i in range(len(cache)):  # one layer at a time, so that only one exists twice
            cache[i] = slot_state.resize_layer(*cache[i], slots, length)
        self.state["cache"], self.length = cache, length

    # ---------------------------------------------------------------------- the answers

    def _read(self, drawn: dict) -> list[Event]:
        """What a call drew, as events; ended answers leave their slots."""
        steps, active, drawn, firsts = jax.device_get(
            (self.state["steps"], self.state["active"], drawn, [f[1:] for f in self.firsts])
        )
        for (makings, *_), first in zip(self.firsts, firsts):
            for making, token, logprob in zip(makings, *first):
                making.token_ids.append(int(token))
                making.logprobs.append(logprob)
        self.firsts = []
        events, stopped = [], []
        for slot, making in list(self.doing.items()):
            new = int(steps[slot]) - len(making.token_ids)
            making.token_ids += drawn["tokens"][slot, :new].tolist()
            making.logprobs += list(drawn["logprobs"][slot, :new])
            answer = self._cut_at_stop_string(making)
            if answer is not None:
                stopped.append(slot)
            elif not active[slot]:
                answer = self._whole(making)
            told, making.told = making.told, len(making.token_ids)
            tokens, logprobs = making.token_ids[told:], making.logprobs[told:]
            events.append(
                Event(making.prompt_id, making.index, tokens, list(map(float, logprobs)), answer)
            )
            if answer is not None:
                self.tokens_drawn += len(answer.token_ids)
                del self.doing[slot]
        self._release(stopped)
        return events

    def _release(self, slots: list[int]) -> None:
        """Stop drawing in these slots."""
        if slots:
            for slot in slots:
                self.doing.pop(slot, None)
            idle = np.zeros(self.rows, bool)
            idle[slots] = True
            self.state = slot_state.release(self.state, idle)

    def _whole(self, making: Making) -> Answer:
        drawn, is_end = making.token_ids, making.token_ids[-1] in self.config.eos_token_ids
        end = drawn[-1] if is_end and not making.sampling.ignore_eos else None
        token_ids = drawn if end is None else drawn[:-1]
        score = float(np.sum(np.array(making.logprobs, np.float32)))
        reason = "length" if end is None else "stop"
        return Answer(self.decode_text(token_ids), token_ids, end, score, reason)

    def _cut_at_stop_string(self, making: Making) -> Answer | None:
        """The answer up to its first stop string; None if it has none. The text ends right before
        the string, the tokens before the token in which the string begins."""
        stop_strings = making.sampling.stop_strings
        if not stop_strings or not self._may_have_stopped(making):
            return None
        token_ids = making.token_ids
        if token_ids[-1] in self.config.eos_token_ids and not making.sampling.ignore_eos:
            token_ids = token_ids[:-1]
        text = self.decode_text(token_ids)
        places = [i for i in map(text.find, stop_strings) if i >= 0]
        if not places:
            return None
        text = text[: min(places)]
        kept = len(token_ids)
        while kept and not text.startswith(self.decode_text(token_ids[:kept])):
            kept -= 1
        score = float(np.sum(np.array(making.logprobs[:kept], np.float32)))
        return Answer(text, token_ids[:kept], None, score, "stop_string")

    def _may_have_stopped(self, making: Making) -> bool:
        """Whether a stop string may end in the new tokens: the text of these, with enough before
        them to hold a stop string's beginning, is looked at alone."""
        stop_strings, start = making.sampling.stop_strings, making.told
        longest, back = max(map(len, stop_strings)), 8
        while start > 0 and len(self.decode_text(making.token_ids[start : making.told])) <= longest:
            start = max(making.told - back, 0)
            back *= 2
        text = self.decode_text(making.token_ids[start:])
        return any(stop in text for stop in stop_strings)
