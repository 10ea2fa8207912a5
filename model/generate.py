"""The sampling engine: a fixed set of slots, each of which holds one answer in the making.

Several prompts are packed into one row and prefilled once (on a CPU in bf16, each has a row of its
own); their keys and values are copied to the slots of their answers. All slots then advance
together, one token per step, in a compiled loop. A slot whose answer has ended is given the next
answer. The cache and the rest of the slots' state (model/slot_state.py) stay on the device, donated
from call to call; the host gets each call's tokens. The cache is only as long as the longest answer
in the making needs, and when no more prompts come, the last answers are gathered into fewer slots.
Both sizes take a few fixed values, each compiled once. How answers are drawn differs from slot to
slot and compiles nothing.

Randomness is a function of (seed, prompt_id, answer index, token position) alone, so an answer does
not depend on the slots, the order of the prompts, or a restart. Arithmetic may depend on the first
two: a matrix product of another shape rounds differently. If a draw falls within that rounding of
the border between two tokens, the answer continues differently from there. A restart of `run`
changes no bit on CPU: the rows of prompts are cut from all prompts, answered or not, and the bits
of a product's row depend neither on the other rows nor, down to `fewest_slots` rows, on how many
there are.

Axis letters: b slot, g answer that starts, p prompt of a row, t index in a row of prompts.
"""

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice, tee

import jax
import numpy as np

from model import attention_tpu, decoder, drawing, kv_cache, slot_state
from model.buckets import coarse_bucket
from model.config import DecoderConfig
from model.precision import FLOAT32, Precision
from model.prompt_rows import PREFILL_PROMPTS, PREFILL_TOKENS, PromptRow, rows_of
from model.slot_state import STEPS_PER_CALL
from sharding.errors import UserError
from sharding.mesh import batch_shards

FEWEST_IN_BF16 = 24  # the fewest slots that round as more slots do, on a CPU in bf16


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

    making: "Making"
    token_ids: list[int]
    logprobs: list[float]
    answer: Answer | None

    @property
    def prompt_id(self) -> str:
        return self.making.prompt_id

    @property
    def index(self) -> int:
        return self.making.index


@dataclasses.dataclass
class Group:
    """Answers to one prompt that start together."""

    prompt_id: str
    token_ids: list[int]
    indices: Sequence[int]
    sampling: Sampling
    row: PromptRow | None = None  # None until it is cut
    prompt: int = 0  # which of the row


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
    cancelled: bool = False


def cache_unit(platform: str) -> int:
    """What a cache's length is a multiple of: on TPUs what their kernel takes, elsewhere 16, since
    odd sizes are a tenth slower on CPU."""
    return attention_tpu.LANES if platform == "tpu" else 16


def side_buffer(platform: str) -> str | None:
    """Where the keys and values of a call are kept, as slot_state.advance takes it: on TPUs beside
    the cache."""
    return "tpu" if platform == "tpu" else None


def round_up(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def fewest_slots(config: DecoderConfig, slots: int, precision: Precision) -> int:
    """How many slots the last answers must keep so that no bit of theirs changes: measured on a CPU
    with jax 0.10 and one device, where small products take other paths."""
    sizes = (
        config.hidden_size,
        config.intermediate_size,
        config.head_dim * config.num_attention_heads,
    )
    fewest = FEWEST_IN_BF16 if precision.rounds_operands else 48
    return min(slots, fewest) if min(sizes) >= 512 else slots


class Sampler:
    """Draws answers to prompts.

        sampler = Sampler(config, params, decode_text, sampling, slots=64, longest_prompt=300)
        for prompt_id, answers in sampler.run(prompts): …         # n answers to each prompt

    or answer by answer, each drawn in its own way:

        sampler.submit("a", token_ids, indices=[0, 1], sampling=Sampling(temperature=0))
        for event in sampler.events(): …                          # tokens, and answers that end

    params: stacked, in any dtype; the caller must drop them, since they are unstacked here. Or the
    `params` of another sampler. `sampling` is the default, and its max_new_tokens the most for any
    answer. An answer's events come in order, the answers in no fixed one.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: decoder.Params,
        decode_text: Callable[[list[int]], str],
        sampling: Sampling,
        slots: int,
        longest_prompt: int,
        precision: Precision = FLOAT32,
    ):
        self.config, self.sampling, self.decode_text = config, sampling, decode_text
        is_stacked = isinstance(params["layers"], dict)
        self.params = kv_cache.unstack_layers(params) if is_stacked else params
        self.slots, self.precision = slots, precision
        self.group = min(sampling.n, slots)  # answers that share one prefill, as a rule
        self.longest_prompt = longest_prompt
        platform = jax.default_backend()
        self.on_cpu, self.unit = platform == "cpu", cache_unit(platform)
        self.longest = round_up(longest_prompt + sampling.max_new_tokens, self.unit)
        self.tokens_drawn = 0  # in finished answers, without EOS
        self.waiting: deque[Group] = deque()
        self.doing: dict[int, Making] = {}  # slot → its answer
        # (answers, their first tokens and log-probs), which are still on the device.
        self.firsts: list[tuple] = []
        self.latest: list[Making] = []  # those of the last call
        self.rows, self.length, self.state = 0, 0, None
        self.more = True  # whether prompts may still come
        self.shards = batch_shards(jax.sharding.get_abstract_mesh())
        self.fewest = fewest_slots(config, slots // self.shards, precision) * self.shards
        # Attention rounds a prompt's last bits by what else is in the row. On a CPU in bf16, the
        # next products' rounding makes other answers of that, so each prompt has a row of its own.
        tokens = PREFILL_TOKENS * (1 if self.on_cpu else 4)
        self.prefill_tokens = 0 if precision.rounds_operands else tokens
        how = {"config": config, "precision": precision}
        prefill, start = slot_state.BY_PARTS if self.on_cpu else slot_state.WHOLE
        self._prefill, self._start = partial(prefill, **how), partial(start, config=config)
        self._advance = partial(slot_state.advance, **how, side_buffer=side_buffer(platform))

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
        if sampling.max_new_tokens > self.sampling.max_new_tokens:
            raise ValueError(f"max_new_tokens is at most {self.sampling.max_new_tokens}")
        self.waiting += self._groups(prompt_id, token_ids, indices, sampling)

    def cancel(self, prompt_id: str, indices: Sequence[int] | None = None) -> None:
        """Forget these answers to a prompt (None: all of them). They bring no further events."""

        def is_meant(index: int) -> bool:
            return indices is None or index in indices

        for group in self.waiting:
            if group.prompt_id == prompt_id:
                group.indices = [index for index in group.indices if not is_meant(index)]
        self.waiting = deque(group for group in self.waiting if group.indices)
        for making in (*self.latest, *self.doing.values()):
            making.cancelled |= making.prompt_id == prompt_id and is_meant(making.index)
        self._release([slot for slot, making in self.doing.items() if making.cancelled])

    def events(self, steps: int = STEPS_PER_CALL) -> Iterator[Event]:
        """What the answers bring, until none is left. Meanwhile more may be submitted or cancelled.
        steps: the most tokens per answer before new ones are admitted, at least 1."""
        self.more = True
        while self.waiting or self.doing:
            while self.admit():
                pass
            for event in self.advance(max(1, steps)):
                if not event.making.cancelled:
                    yield event

    # ------------------------------------------------------------------ all answers of a file

    def run(
        self,
        prompts: Iterable[tuple[str, list[int]]],
        each_call: Callable[[], None] = lambda: None,
        answered: Collection[str] = (),
    ) -> Iterator[tuple[str, list[Answer]]]:
        """(prompt_id, its n answers in order of their index) for each (prompt_id, token ids) whose
        prompt_id is not in `answered`. (Those still decide which prompts share a row.)

        A prompt's answers come when the last of them has ended, so prompts come in no fixed order.
        `each_call` runs between two calls of the device; it may raise to stop the run.
        """
        rows, done = self.rows_of_groups(prompts, answered), Complete(self.sampling.n)
        self.begin()
        while (events := self.call(rows)) is not None:
            yield from done.add(events)
            each_call()

    def begin(self) -> None:
        """Forget all answers in the making."""
        self.waiting.clear()
        self.doing.clear()
        self.firsts, self.rows, self.more = [], 0, True

    def call(self, rows: Iterator[list[Group]]) -> list[Event] | None:
        """Admit what fits of the rows' groups, and advance: what came, or None when all is done."""
        while True:
            if not self.waiting and self.more:
                groups = next(rows, None)
                self.waiting += groups or ()
                self.more = groups is not None
            if not self.admit():
                return self.advance() if self.doing else None

    def rows_of_groups(self, prompts, answered) -> Iterator[list[Group]]:
        """The groups of each row of prompts, those that are answered left out."""
        for row in rows_of(prompts, self.prefill_tokens):
            groups = [
                dataclasses.replace(group, row=row, prompt=number)
                for number, prompt in enumerate(row.prompts)
                if prompt[0] not in answered
                for group in self._groups(*prompt, range(self.sampling.n), self.sampling)
            ]
            if groups:
                yield groups

    def _groups(self, prompt_id, token_ids, indices, sampling) -> Iterator[Group]:
        """Answers to one prompt, at most as many in a group as there are slots."""
        if len(token_ids) > self.longest_prompt:
            raise ValueError(
                f"a prompt of {len(token_ids)} tokens: longest_prompt is {self.longest_prompt}"
            )
        if not token_ids:
            raise ValueError("a prompt without tokens")
        for start in range(0, len(indices), self.slots):
            yield Group(prompt_id, token_ids, indices[start : start + self.slots], sampling)

    # ---------------------------------------------------------------------- calls of the device

    def admit(self) -> bool:
        """Copy the first of the waiting prompts, prefilled, into one free slot per answer, and draw
        the answers' first tokens. False: none waits, or none fits."""
        if not self.doing and self.waiting and self.rows < self.slots:
            self._empty()
        count = self._how_many_fit()
        if not count:
            return False
        groups = [self.waiting.popleft() for _ in range(count)]
        row, starting, makings = groups[0].row, *self._starting(groups)
        needed = self._cache_length(int(max(starting["lengths"])))
        if self.length < needed:
            self._resize(needed)
        if row.kv is None:
            ends_p = row.starts + row.lengths - 1
            row.kv, row.logits_pv = self._prefill(self.params, row.arrays, ends_p)
        self.state, *first = self._start(self.state, row.kv, row.logits_pv, starting)
        self.firsts.append((makings, *first))
        return True

    def advance(self, steps: int = STEPS_PER_CALL) -> list[Event]:
        """Draw up to `steps` tokens in each slot, and tell what came. The call ends earlier once
        answers that wait can be admitted, or, when no more prompts come, once fewer slots do."""
        if not self.doing:
            return []
        self._fit()
        if self.waiting:
            enough = max(0, self.rows - self._wanted())
        else:
            enough = self._fewer() if self._fewer() < self.rows else 0
        self.state, drawn = self._advance(self.params, self.state, enough, steps)
        return self._read(drawn)

    def _how_many_fit(self) -> int:
        """How many of the waiting groups of one row can start now: 8, 4, 2, 1 or none."""
        if self.waiting and self.waiting[0].row is None:
            self._cut_row()
        row = self.waiting[0].row if self.waiting else None
        first = [g for g in islice(self.waiting, PREFILL_PROMPTS) if g.row is row]
        count, free = PREFILL_PROMPTS, self.rows - len(self.doing)
        while count > len(first) or sum(len(g.indices) for g in first[:count]) > free:
            count //= 2
        return count

    def _cut_row(self) -> None:
        """Make a row of the first of those that were submitted."""
        groups, tokens = [], 0
        for group in islice(self.waiting, PREFILL_PROMPTS):
            tokens += len(group.token_ids)
            if groups and (group.row is not None or tokens > self.prefill_tokens):
                break
            groups.append(group)
        row = PromptRow([(group.prompt_id, group.token_ids) for group in groups])
        for number, group in enumerate(groups):
            group.row, group.prompt = row, number

    def _wanted(self) -> int:
        """How many idle slots end a call while answers wait: enough for the first group. Off CPU,
        where looking costs more than a few idle slots, a sixteenth of all if so many wait."""
        wanted = 0
        for group in islice(self.waiting, PREFILL_PROMPTS):
            if wanted and (self.on_cpu or wanted + len(group.indices) > self.rows // 16):
                break
            wanted += len(group.indices)
        return wanted

    def _starting(self, groups: list[Group]) -> tuple[dict, list[Making]]:
        """(Where and how each answer starts, the answers) of groups of one row."""
        largest = max(len(group.indices) for group in groups)
        if largest > self.group:  # few sizes to compile
            largest = min(2 ** (largest - 1).bit_length(), self.slots)
        starting = slot_state.nothing_starts(max(largest, self.group) * len(groups), self.rows)
        free = [slot for slot in range(self.rows) if slot not in self.doing]
        makings: list[Making] = []
        for group in groups:
            how, row = group.sampling, group.row
            for index in group.indices:
                slot, g = free.pop(), len(makings)
                self.doing[slot] = Making(group.prompt_id, index, len(group.token_ids), how)
                makings.append(self.doing[slot])
                values = {"slots": slot, "prompts": group.prompt, "limits": how.max_new_tokens}
                values |= {"starts": row.starts[group.prompt], "lengths": len(group.token_ids)}
                values |= {"ignore_eos": how.ignore_eos}
                values["keys"] = drawing.answer_key(how.seed, group.prompt_id, index)
                for name, value in values.items():
                    starting[name][g] = value
                for name, column in starting["settings"].items():
                    column[g] = getattr(how, name)
        return starting, makings

    # ------------------------------------------------------------ the sizes of the state

    def _empty(self) -> None:
        self.state = None  # before there is another
        self.rows = self.slots
        self.length = self._cache_length(self.longest_prompt + STEPS_PER_CALL)
        self.state = slot_state.empty(self.config, self.rows, self.length, self.precision)

    def _cache_length(self, needed: int) -> int:
        # Below 128, compiling another length costs more than it saves.
        length = max(128, coarse_bucket(needed))
        return min(round_up(length, self.unit), self.longest)

    def _fewer(self) -> int:
        """The next smaller number of slots (two at most), or that of now: when no more come."""
        may = not self.more and not self.waiting
        may = may and self.rows > max(self.fewest, self.slots // 4)
        fewer = max(self.fewest, self.rows // 2) if may else self.rows
        return fewer if fewer % self.shards == 0 else self.rows

    def _fit(self) -> None:
        """Make the cache long enough for the next call, or shorter if that halves it. When no more
        prompts come and the answers fit into fewer slots, gather them there."""
        ends = (
            m.prompt_length
            + min(max(len(m.token_ids), 1) + STEPS_PER_CALL, m.sampling.max_new_tokens)
            for m in self.doing.values()
        )
        length, rows = self._cache_length(max(ends)), self.rows
        if len(self.doing) <= self._fewer():
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
        events, stopped, self.latest = [], [], list(self.doing.values())
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
            events.append(Event(making, tokens, list(map(float, logprobs)), answer))
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
        longest, back, before = max(map(len, stop_strings)), 8, ""
        # A text that begins within a character begins with "\ufffd".
        while start > 0 and (before[:1] in ("", "\ufffd") or len(before) <= longest):
            start = max(making.told - back, 0)
            before = self.decode_text(making.token_ids[start : making.told])
            back *= 2
        text = self.decode_text(making.token_ids[start:])
        return any(stop in text for stop in stop_strings)


class Complete:
    """The answers that have ended, until all `n` of a prompt have."""

    def __init__(self, n: int):
        self.n, self.answers = n, {}  # prompt_id → index → answer

    def add(self, events: list[Event]) -> Iterator[tuple[str, list[Answer]]]:
        """(prompt_id, its answers in order of their index) of each prompt that is complete now."""
        for event in events:
            if event.answer is not None:
                answers = self.answers.setdefault(event.prompt_id, {})
                answers[event.index] = event.answer
                if len(answers) == self.n:
                    del self.answers[event.prompt_id]
                    yield event.prompt_id, [answers[i] for i in range(self.n)]


def run_side_by_side(
    samplers: list[Sampler],
    prompts: Iterable[tuple[str, list[int]]],
    each_call: Callable[[], None] = lambda: None,
    answered: Collection[str] = (),
) -> Iterator[tuple[str, list[Answer]]]:
    """As `Sampler.run`, by several samplers at once, each in its own thread. Rows of prompts are
    dealt in turn, so it does not depend on speed which sampler answers a prompt. On a CPU, what
    occupies one core in one sampler runs beside the other's work.

    The threads read `prompts`, one at a time; `each_call` runs in the caller's thread.
    """
    if len(samplers) == 1:
        yield from samplers[0].run(prompts, each_call, answered)
        return
    done, count = Complete(samplers[0].sampling.n), len(samplers)
    rows = tee(samplers[0].rows_of_groups(prompts, answered), count)
    mesh, lock = jax.sharding.get_mesh(), threading.Lock()

    def dealt_to(number: int) -> Iterator[list[Group]]:
        mine = islice(rows[number], number, None, count)
        while True:
            with lock:
                groups = next(mine, None)
            if groups is None:
                return
            yield groups

    def call(sampler: Sampler, rows: Iterator[list[Group]]) -> list[Event] | None:
        with jax.set_mesh(mesh):  # a thread begins without one
            return sampler.call(rows)

    with ThreadPoolExecutor(count) as pool:
        calls = {}
        for number, sampler in enumerate(samplers):
            sampler.begin()
            mine = sampler, dealt_to(number)
            calls[pool.submit(call, *mine)] = mine
        while calls:
            for ended in wait(calls, return_when=FIRST_COMPLETED).done:
                mine = calls.pop(ended)
                if (events := ended.result()) is not None:
                    calls[pool.submit(call, *mine)] = mine
                    yield from done.add(events)
            each_call()
