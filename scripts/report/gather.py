"""Read the files of a run of scripts/iterate.sh: what the table and the page are made from.

What the run has not made yet is None or empty.
"""

import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from etils import epath

from model.weights import read_json
from scripts.report import graph
from stages.evaluate.winrates import standard_error
from stages.files.rows import Fields, json_rows, parse_json

Z = 1.959964  # 97.5% quantile of the normal distribution


def mean(values: list) -> float | None:
    return float(np.mean(values)) if len(values) else None


@dataclasses.dataclass
class Model:
    """The start model or an iteration's, and its answers to the held-out prompts."""

    name: str  # its folder: start, iteration_1, …
    rows: list[Fields]  # heldout.ranked.jsonl, or heldout.samples.jsonl before they are ranked
    against: dict[str, Fields]  # "start", "previous" → what `evaluate compare` wrote
    kl_to: dict[str, Fields]  # "start", "previous" → what `evaluate kl` wrote
    metrics: list[Fields]  # one row per step of the training that made it

    @cached_property
    def answers(self) -> list[Fields]:
        return [response for row in self.rows for response in row["responses"]]

    @cached_property
    def texts(self) -> list[str]:
        return [answer["text"] for answer in self.answers]

    @cached_property
    def relative(self) -> bool:
        """Whether scores only compare the answers of one row, as a pairwise ranker's do."""
        return any("comparisons" in row for row in self.rows)

    @cached_property
    def scores(self) -> list[float]:
        """The mean score of each prompt's answers; empty where scores are relative."""
        if self.relative:
            return []
        return [mean(row["scores"]) for row in self.rows if row.get("scores")]

    def reward(self) -> tuple[float, float] | None:
        """(mean, half the width of its 95% interval) of the prompts' mean scores."""
        error = standard_error(np.array(self.scores))
        return None if error is None else (mean(self.scores), Z * error)

    def terms(self) -> dict[str, float]:
        """The mean of each term of the reward, where the reward function gives its terms."""
        each = [terms for row in self.rows for terms in row.get("score_terms", [])]
        names = dict.fromkeys(name for terms in each for name in terms)
        return {name: mean([terms[name] for terms in each if name in terms]) for name in names}

    def training(self, name: str) -> float | None:
        """The mean of a training metric over the second half of the steps."""
        values = [row[name] for row in self.metrics if name in row]
        return mean(values[len(values) // 2 :])


@dataclasses.dataclass
class Trained:
    """What an iteration was trained on."""

    name: str
    scores: list[float] = dataclasses.field(default_factory=list)  # one per answer
    distinct: list[float] = dataclasses.field(default_factory=list)
    """the share of different answers to each prompt"""
    finished: list[bool] = dataclasses.field(default_factory=list)  # one per answer
    pairs: dict[str, list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    """chosen_score, rejected_score, chosen_characters, rejected_characters: one value per pair"""
    tokens: Counter = dataclasses.field(default_factory=Counter)  # file → tokens of its answers


@dataclasses.dataclass
class Run:
    name: str
    settings: dict  # what decides the results, by scripts.recipe: dotted key → value
    models: list[Model]  # the start model first
    trained: list[Trained]
    nodes: list[graph.Node]  # parents first
    tokens: dict[str, int]  # file → tokens of its answers


def read(run: str) -> Run:
    """The whole run; each of its files is read once. Raises UserError where `run` is no run."""
    folder = epath.Path(run)
    trained = [_trained(place) for place in graph.places(folder) if place.name != "start"]
    answered, settings = models(run), folder / "settings.json"
    tokens = {f"{t.name}/{file}": n for t in trained for file, n in t.tokens.items()}
    for model in answered:
        count = sum(len(answer.get("token_ids", [])) for answer in model.answers)
        tokens[f"{model.name}/heldout.samples.jsonl"] = count
    return Run(
        name=folder.name,
        settings=read_json(settings, "restore it") if settings.exists() else {},
        models=answered,
        trained=[t for t in trained if t.scores or t.pairs],
        nodes=graph.read(run),
        tokens=tokens,
    )


def models(run: str) -> list[Model]:
    """The models that have answers or metrics. Raises UserError where `run` is no run."""
    read_so_far = []
    for place in graph.places(epath.Path(run)):
        rows = [*_rows(place / "heldout.ranked.jsonl")]
        rows = rows or [*_rows(place / "heldout.samples.jsonl")]
        metrics = _metrics(place / "checkpoint.log/metrics.jsonl")
        if rows or metrics:
            measured = (_measured(place, name) for name in ("against", "kl_to"))
            read_so_far.append(Model(place.name, rows, *measured, metrics))
    return read_so_far


# ---------------------------------------------------------------------------------- reading


def _rows(path) -> Iterator[Fields]:
    if path.exists():
        yield from (row for _, row in json_rows(str(path)))


def _metrics(path) -> list[Fields]:
    """The rows of a training's metrics, without lines that a kill or a power cut spoilt."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(parse_json(line))
    return rows


def _measured(place, name: str) -> dict[str, Fields]:
    """The measurements against the start model and the previous one that exist so far."""
    measured = {}
    for other in ("start", "previous"):
        # The previous model of the first iteration is the start model.
        path = place / f"{name}_{'start' if place.name == 'iteration_1' else other}.json"
        if path.exists():
            measured[other] = read_json(path, "remove it, and run the loop again")
    return measured


def _trained(place) -> Trained:
    trained = Trained(place.name)
    for row in _rows(place / "ranked.jsonl"):
        answers = row["responses"]
        trained.scores += row["scores"]
        trained.tokens["samples.jsonl"] += sum(len(a.get("token_ids", [])) for a in answers)
        different = len({answer["text"] for answer in answers})
        trained.distinct.append(different / max(1, len(answers)))
        trained.finished += [answer.get("finish_reason") in ("stop", None) for answer in answers]
    for row in _rows(place / "pairs.jsonl"):
        for side in ("chosen", "rejected"):
            if f"{side}_index" in row:  # not in pairs of others
                score = row["all_rm_scores"][row[f"{side}_index"]]
                trained.pairs[f"{side}_score"].append(score)
            trained.pairs[f"{side}_characters"].append(len(row[side][-1]["content"]))
        names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
        trained.tokens["checkpoint"] += sum(len(row.get(name, [])) for name in names)
    return trained
