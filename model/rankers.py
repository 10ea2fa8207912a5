"""One way to open whatever `--ranker` names: a reward function now, PairRM by its own file.

A reward function lives in a Python file of the user's, named as FILE.py:FUNCTION:

    def function(prompt: str, responses: list[str]) -> list[float]      # higher is better

It may also take `finish_reasons: list[str]` ("stop", "length", "stop_string" per response), which
it then is given by name, and it may carry an attribute `terms`, a function
(prompt, response, finish_reason) -> dict[str, float] whose values are recorded beside the scores.
"""

import dataclasses
import hashlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path


class RankerError(ValueError):
    """A ranker that cannot be opened, or gave no usable scores; the message says why."""


@dataclasses.dataclass
class Ranking:
    scores: list[float]  # one per response, higher is better
    comparisons: list[list[float]] | None = None  # n×n logits, pairwise rankers only
    terms: list[dict[str, float]] | None = None  # what the scores consist of, where the ranker says


class FunctionRanker:
    """A reward function from the user's file. `identity` is the sha256 of the file and the name."""

    def __init__(self, path: str, name: str):
        self.name = f"{path}:{name}"
        if not Path(path).is_file():
            raise RankerError(f"ranker {self.name}: {path} does not exist")
        digest = hashlib.sha256(Path(path).read_bytes() + b"\n" + name.encode())
        self.identity = digest.hexdigest()
        spec = importlib.util.spec_from_file_location(f"ranker_{self.identity[:8]}", path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise RankerError(f"ranker {self.name}: {path} does not import ({error!r})") from error
        self.function: Callable | None = getattr(module, name, None)
        if not callable(self.function):
            raise RankerError(f"ranker {self.name}: {path} defines no function {name!r}")
        parameters = inspect.signature(self.function).parameters
        self._wants_reasons = "finish_reasons" in parameters
        self._terms = getattr(self.function, "terms", None)

    def rank(self, prompt: str, responses: list[str], finish_reasons: list[str]) -> Ranking:
        """Raises RankerError where the function raises or does not give one finite number each."""
        try:
            extra = {"finish_reasons": list(finish_reasons)} if self._wants_reasons else {}
            scores = self.function(prompt, list(responses), **extra)
            terms = self._terms and [
                self._terms(prompt, *pair) for pair in zip(responses, finish_reasons)
            ]
        except Exception as error:
            raise RankerError(f"{self.name} raised {error!r}") from error
        try:
            scores = [float(score) for score in scores]
        except (TypeError, ValueError):
            raise RankerError(f"{self.name} returned {scores!r}, not a list of numbers") from None
        if len(scores) != len(responses):
            raise RankerError(
                f"{self.name} returned {len(scores)} scores for {len(responses)} responses"
            )
        if not all(math.isfinite(score) for score in scores):
            raise RankerError(f"{self.name} returned a score that is not finite: {scores}")
        return Ranking(scores, terms=terms)


def open_ranker(name: str) -> FunctionRanker:
    """Open FILE.py:FUNCTION. Anything else would be PairRM's folder or hub id: not built yet."""
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return FunctionRanker(path, function)
    raise RankerError(
        f"ranker {name!r} is not FILE.py:FUNCTION; PairRM (a folder or hub id) is not built yet"
    )
