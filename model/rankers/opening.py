"""One way to open whatever `--ranker` names, and to ask it for rankings.

A reward function lives in a Python file of the user's, named as FILE.py:FUNCTION:

    def function(prompt: str, responses: list[str]) -> list[float]      # higher is better

It may also take `finish_reasons: list[str]` ("stop", "length", "stop_string" per response), which
it then is given by name, and it may carry an attribute `terms`, a function
(prompt, response, finish_reason) -> dict[str, float] whose values are recorded beside the scores.

Anything else is the folder or hub id of a PairRM (model/rankers/pairrm.py).
"""

import dataclasses
import hashlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from model.rankers.comparisons import Aggregation, Comparisons, Pair, Ranking, Strategy, strategy
from sharding.errors import UserError


@dataclasses.dataclass
class Request:
    """The answers to one prompt, to be ranked. `where` names the row in messages."""

    where: str
    prompt_id: str
    prompt: str  # what a reward function sees
    messages: list[dict]  # the conversation up to and with the prompt
    responses: list[str]
    finish_reasons: list[str]
    row: dict = dataclasses.field(default_factory=dict)  # the caller's own


# Called as comparisons or prompts are done, with their number; may raise to stop.
Done = Callable[[int], None]


class FunctionRanker:
    """A reward function from the user's file. `identity` is the sha256 of the file and the name."""

    def __init__(self, path: str, name: str):
        self.name = f"{path}:{name}"
        if not Path(path).is_file():
            raise UserError(f"ranker {self.name}: {path} does not exist")
        digest = hashlib.sha256(Path(path).read_bytes() + b"\n" + name.encode())
        self.identity = digest.hexdigest()
        spec = importlib.util.spec_from_file_location(f"ranker_{self.identity[:8]}", path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"ranker {self.name}: {path} does not import ({error!r})") from error
        self.function: Callable | None = getattr(module, name, None)
        if not callable(self.function):
            raise UserError(f"ranker {self.name}: {path} defines no function {name!r}")
        parameters = inspect.signature(self.function).parameters
        self._wants_reasons = "finish_reasons" in parameters
        self._terms = getattr(self.function, "terms", None)

    def rank_all(
        self, requests: Iterable[Request], done: Done
    ) -> Iterator[tuple[Request, Ranking]]:
        for request in requests:
            try:
                ranking = self.rank(request.prompt, request.responses, request.finish_reasons)
            except UserError as error:
                raise UserError(
                    f"{request.where}, prompt_id {request.prompt_id!r}: {error}; "
                    "mend the function, then run again (the prompts before it are kept)"
                ) from error
            yield request, ranking
            done(1)

    def rank(self, prompt: str, responses: list[str], finish_reasons: list[str]) -> Ranking:
        """Raises UserError where the function raises or does not give one finite number each."""
        try:
            extra = {"finish_reasons": list(finish_reasons)} if self._wants_reasons else {}
            scores = self.function(prompt, list(responses), **extra)
            terms = self._terms and [
                self._terms(prompt, *pair) for pair in zip(responses, finish_reasons)
            ]
        except Exception as error:
            raise UserError(f"{self.name} raised {error!r}") from error
        try:
            scores = [float(score) for score in scores]
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{self.name} returned {scores!r}, not a list of numbers") from None
        if len(scores) != len(responses):
            raise UserError(
                f"{self.name} returned {len(scores)} scores for {len(responses)} responses"
            )
        if not all(math.isfinite(score) for score in scores):
            raise UserError(f"{self.name} returned a score that is not finite: {scores}")
        return Ranking(scores, terms=terms)


class PairwiseRanker:
    """PairRM, or llm-blender's: answers compared in pairs, prompts grouped into full batches.

    model: has `encode(source, candidates)`, `logits(comparisons, done)`, an `identity`, and
    `enough(comparisons)`: whether these make full batches.
    """

    def __init__(self, model, comparisons: Comparisons, aggregation: Aggregation):
        self.model, self.identity = model, model.identity
        self._comparisons, self._aggregation = comparisons, aggregation

    def rank_all(
        self, requests: Iterable[Request], done: Done
    ) -> Iterator[tuple[Request, Ranking]]:
        """Rankings as they become complete. A prompt's place among others changes nothing."""
        requests, active = iter(requests), []
        while True:
            asked = [(a.encoded, *pair) for a in active for pair in a.wanted]
            if not self.model.enough(asked) and (request := next(requests, None)):
                begun = self._begin(request)
                if begun.ranking is None:
                    active.append(begun)
                else:  # nothing to compare
                    yield request, begun.ranking
                continue
            if not active:
                return
            try:
                logits = iter(self.model.logits(asked, done))
            except ValueError as error:
                first = active[0].request
                raise UserError(f"{first.where} (or soon after it): {error}") from error
            for a in active:
                a.receive({pair: next(logits) for pair in a.wanted})
                if a.ranking is not None:
                    yield a.request, a.ranking
            active = [a for a in active if a.ranking is None]

    def _begin(self, request: Request) -> "_Active":
        source, candidates = as_comparison(request.messages, request.responses)
        plan = strategy(self._comparisons, request.responses, self._aggregation, request.prompt_id)
        try:
            return _Active(request, self.model.encode(source, candidates), plan)
        except ValueError as error:
            raise UserError(f"{request.where}, prompt_id {request.prompt_id!r}: {error}") from error


class _Active:
    """A prompt whose comparisons are being made: `wanted` are those to make next; `ranking` is
    there once there are none."""

    def __init__(self, request: Request, encoded, plan: Strategy):
        self.request, self.encoded, self._plan = request, encoded, plan
        self.ranking: Ranking | None = None
        self.receive(None)

    def receive(self, logits: dict[Pair, float] | None):
        """The logits of what was wanted (None: nothing was yet)."""
        try:
            self.wanted = self._plan.send(logits)
        except StopIteration as end:
            self.wanted, self.ranking = [], end.value
            self.ranking.truncated = getattr(self.encoded, "truncated", None)


CONVERSATION = (
    "Finish the following coversation in each i-th turn by filling in <Response i> with your "
    "response."
)  # the words, and the spelling, that llm-blender gives PairRM


def as_comparison(messages: list[dict], responses: list[str]) -> tuple[str, list[str]]:
    """(source, candidates) of a conversation and the answers to its last turn.

    One user turn is itself the source. Earlier turns are laid out as in llm-blender's
    `compare_conversations`: all user turns in the source, all answers in each candidate. A system
    message, for which it has no layout, stands first, in a line of its own. Raises ValueError
    where user and assistant do not take turns.
    """
    system = [m["content"] for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    if [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError("user and assistant do not take turns")
    if len(turns) == 1:
        return "\n".join([*system, turns[0]["content"]]), list(responses)
    questions = [m["content"] for m in turns[::2]]
    earlier = [m["content"] for m in turns[1::2]]
    source = "\n".join(
        f"USER: {text}\nAssistant: <Response {k}>" for k, text in enumerate(questions, 1)
    )
    candidates = [
        "\n".join(f"<Response {k}>: {text}" for k, text in enumerate([*earlier, answer], 1))
        for answer in responses
    ]
    return "\n".join([*system, CONVERSATION + source]), candidates


def open_ranker(
    name: str,
    comparisons: Comparisons = "full",
    aggregation: Aggregation = "max_logits",
    backend: Literal["jax", "llm-blender"] = "jax",
    device: Literal["accelerator", "host"] = "accelerator",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> FunctionRanker | PairwiseRanker:
    """Open FILE.py:FUNCTION, or the PairRM in a folder or under a hub id, to which all but `name`
    apply and whose weights are loaded only when they are needed. Raises UserError."""
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return FunctionRanker(path, function)
    if name.endswith(".py"):
        raise UserError(f"ranker {name} names no function: give FILE.py:FUNCTION")
    # Imported here, since a reward function needs neither JAX nor PyTorch.

    try:
        if backend == "llm-blender":
            from model.rankers.blender import BlenderRanker

            model = BlenderRanker(name)
        else:
            import jax
            import jax.numpy as jnp

            from model.rankers.pairrm import PairRM

            if device == "host":
                jax.config.update("jax_platforms", "cpu")  # leave the accelerator alone
            model = PairRM(name, dtype=jnp.dtype(dtype))
    except UserError as error:
        raise UserError(f"ranker {error}") from error
    return PairwiseRanker(model, comparisons, aggregation)
