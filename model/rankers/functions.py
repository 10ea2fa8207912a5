"""Reward functions: a Python function in a file of the user's, named as FILE.py:FUNCTION.

    def function(prompt: str, responses: list[str]) -> list[float]      # higher is better

The function may also take `finish_reasons: list[str]` ("stop", "length" or "stop_string" per
response). It may carry an attribute `terms`, a function (prompt, response, finish_reason) ->
dict[str, float], whose values are recorded beside the scores. Modules in the file's own folder can
be imported while the file is loaded.
"""

import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from model.rankers.ranking import Done, Ranking, Request
from sharding.errors import UserError


class FunctionRanker:
    """A reward function from the user's file. `identity` is the sha256 of the file and the name."""

    on_mesh = False

    def __init__(self, path: str, name: str):
        self.name = f"{path}:{name}"
        if not Path(path).is_file():
            raise UserError(f"ranker {self.name}: {path} does not exist")
        digest = hashlib.sha256(Path(path).read_bytes() + b"\n" + name.encode())
        self.identity = digest.hexdigest()
        module = _load(path, f"ranker_{self.identity[:8]}", self.name)
        self.function: Callable | None = getattr(module, name, None)
        if not callable(self.function):
            raise UserError(f"ranker {self.name}: {path} defines no function {name!r}")
        self._wants_reasons = "finish_reasons" in inspect.signature(self.function).parameters
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
        """Raises UserError if the function raises, or does not return one finite number per
        response."""
        try:
            extra = {"finish_reasons": list(finish_reasons)} if self._wants_reasons else {}
            scores = self.function(prompt, list(responses), **extra)
            terms = self._terms and [
                self._terms(prompt, *pair) for pair in zip(responses, finish_reasons)
            ]
        except (Exception, SystemExit) as error:  # sys.exit would end the stage without a word
            raise UserError(f"{self.name} raised {error!r}") from error
        try:
            if isinstance(scores, str | bytes):  # "12" would count as the scores 1 and 2
                raise TypeError
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


def _load(path: str, module_name: str, ranker: str):
    """The user's file as a module."""
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    # A dataclass with postponed annotations looks its module up in sys.modules.
    sys.modules[module_name] = module
    folder = str(Path(path).resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise UserError(f"ranker {ranker}: {path} does not import ({error!r})") from error
    finally:
        sys.path.remove(folder)
    return module
