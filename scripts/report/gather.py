"""Read the files of a run of scripts/iterate.sh: what the table and the page are made from.

What the run has not made yet is None or empty.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from etils import epath

from scripts.report import graph
from sharding.errors import UserError
from stages.evaluate.winrates import standard_error
from stages.files.benchmarks import conversation_key
from stages.files.rows import Fields, json_rows, messages_of

Z = 1.959964  # 97.5% quantile of the normal distribution


@dataclasses.dataclass
class Model:
    """The start model or an iteration's, and its answers to the held-out prompts."""

    name: str  # its folder: start, iteration_1, …
    rows: list[Fields]  # heldout.ranked.jsonl, or heldout.samples.jsonl before they are ranked
    against_start: Fields | None  # what `evaluate compare` wrote
    against_previous: Fields | None
    kl_to_start: Fields | None  # what `evaluate kl` wrote
    kl_to_previous: Fields | None
    metrics: list[Fields]  # one row per step of the training that made it

    @cached_property
    def texts(self) -> list[str]:
        return [response["text"] for row in self.rows for response in row["responses"]]

    @cached_property
    def relative(self) -> bool:
        """Whether scores only compare the answers of one row, as a pairwise ranker's do."""
        return any("comparisons" in row for row in self.rows)

    @cached_property
    def scores(self) -> list[float]:
        """The mean score of each prompt's answers; empty where scores are relative."""
        if self.relative:
            return []
        return [float(np.mean(row["scores"])) for row in self.rows if row.get("scores")]

    def reward(self) -> tuple[float, float] | None:
        """(mean, half the width of its 95% interval) of the prompts' mean scores."""
        if len(self.scores) < 2:
            return None
        return float(np.mean(self.scores)), Z * standard_error(np.array(self.scores))

    def words(self) -> float | None:
        return float(np.mean([len(text.split()) for text in self.texts])) if self.texts else None

    def finished(self) -> float | None:
        """The share of answers that the model ended itself."""
        ended = [
            answer.get("finish_reason") == "stop"
            for row in self.rows
            for answer in row["responses"]
        ]
        return float(np.mean(ended)) if ended else None

    def distinct(self) -> float | None:
        """Different texts as a share of all answers: 1 where no answer repeats another."""
        return len(set(self.texts)) / len(self.texts) if self.texts else None

    def terms(self) -> dict[str, float]:
        """The mean of each term of the reward, where the reward function gives its terms."""
        each = [terms for row in self.rows for terms in row.get("score_terms", [])]
        return {name: float(np.mean([t[name] for t in each])) for name in (each[0] if each else {})}

    def training(self, name: str) -> float | None:
        """The mean of a training metric over the second half of the steps."""
        values = [row[name] for row in self.metrics if name in row]
        return float(np.mean(values[len(values) // 2 :])) if values else None


@dataclasses.dataclass
class Trained:
    """What an iteration was trained on."""

    name: str
    scores: list[float] = dataclasses.field(default_factory=list)  # one per answer
    distinct: float | None = None  # the share of different answers to a prompt, mean over prompts
    finished: float | None = None
    pairs: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """chosen_score, rejected_score, chosen_characters, rejected_characters: one value per pair"""
    tokens: Counter = dataclasses.field(default_factory=Counter)  # file → tokens of its answers


@dataclasses.dataclass
class StageSummary:
    """A file that a stage wrote, its rows in and out, and the rows left out."""

    path: str
    name: str
    seconds: float | None
    tokens: int | None
    rate: float | None  # tokens per second, by the stage's own measure
    took: int | None  # rows
    gave: int | None
    aside: dict[str, int]  # reason → rows


@dataclasses.dataclass
class Run:
    name: str
    settings: str
    models: list[Model]  # the start model first
    trained: list[Trained]
    nodes: list[graph.Node]  # parents first
    stages: list[StageSummary]


def read(run: str) -> Run:
    """The whole run; each of its files is read once. Raises UserError where `run` is no run."""
    folder = epath.Path(run)
    trained = [_trained(place) for place in graph.places(folder) if place.name != "start"]
    trained = [t for t in trained if t.scores or t.pairs]
    answered = models(run)
    tokens = {f"{t.name}/{file}": n for t in trained for file, n in t.tokens.items()}
    for model in answered:
        tokens[f"{model.name}/heldout.samples.jsonl"] = sum(
            len(answer.get("token_ids", [])) for row in model.rows for answer in row["responses"]
        )
    nodes, settings = graph.read(run), folder / "settings"
    return Run(
        name=folder.name,
        settings=settings.read_text().strip() if settings.exists() else "",
        models=answered,
        trained=trained,
        nodes=nodes,
        stages=[_summary(node, tokens) for node in nodes if node.manifest],
    )


def models(run: str) -> list[Model]:
    """The models that have answers or metrics. Raises UserError where `run` is no run."""
    read_so_far = []
    for place in graph.places(epath.Path(run)):
        rows = [*_rows(place / "heldout.ranked.jsonl")]
        rows = rows or [*_rows(place / "heldout.samples.jsonl")]
        start, kl = (_json(place / f"{name}_start.json") for name in ("against", "kl_to"))
        first = place.name == "iteration_1"  # its previous model is the start model
        model = Model(
            place.name,
            rows,
            start,
            start if first else _json(place / "against_previous.json"),
            kl,
            kl if first else _json(place / "kl_to_previous.json"),
            _metrics(place / "checkpoint.log/metrics.jsonl"),
        )
        if rows or model.metrics:
            read_so_far.append(model)
    return read_so_far


def preferences(compared: Fields | None) -> dict[str, float]:
    """Instruction → 1 where the model won, 0.5 at a tie, 0 where it lost."""
    rows = compared["per_instruction"] if compared else []
    return {row["instruction"]: row["preference"] for row in rows}


def instruction(row: Fields) -> str:
    """The name of a row's prompt in the files of `evaluate compare`."""
    return conversation_key(messages_of(row, "held-out prompts"))


# ---------------------------------------------------------------------------------- reading


def _rows(path) -> Iterator[Fields]:
    if path.exists():
        yield from (row for _, row in json_rows(str(path)))


def _metrics(path) -> list[Fields]:
    """The rows of a training's metrics; a line that a kill cut off is not one yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _json(path) -> Fields | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): remove it, and run the loop again") from None


def _trained(place) -> Trained:
    trained = Trained(place.name)
    distinct, ended = [], []
    for row in _rows(place / "ranked.jsonl"):
        answers = row["responses"]
        trained.scores += row["scores"]
        trained.tokens["samples.jsonl"] += sum(len(a.get("token_ids", [])) for a in answers)
        distinct.append(len({answer["text"] for answer in answers}) / max(1, len(answers)))
        ended += [answer.get("finish_reason") == "stop" for answer in answers]
    if distinct:
        trained.distinct, trained.finished = float(np.mean(distinct)), float(np.mean(ended))
    for row in _rows(place / "pairs.jsonl"):
        for side in ("chosen", "rejected"):
            score = row["all_rm_scores"][row[f"{side}_index"]]
            trained.pairs.setdefault(f"{side}_score", []).append(score)
            length = len(row[side][-1]["content"])
            trained.pairs.setdefault(f"{side}_characters", []).append(length)
        names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
        trained.tokens["checkpoint"] += sum(len(row.get(name, [])) for name in names)
    return trained


def _summary(node: graph.Node, answer_tokens: dict[str, int]) -> StageSummary:
    made, tokens, rate = node.manifest, answer_tokens.get(node.path), None
    if made.stage == "sample" and (sitting := made.results.get("last_sitting")):
        rate = sitting["tokens"] / max(sitting["seconds"], 0.1)
    elif made.stage == "dpo" and tokens:  # before texts are cut to the lengths
        tokens *= made.arguments["epochs"]
        rate = tokens / max(made.results["train_seconds"], 0.1)
    counts = dict(made.counts)
    took, gave = counts.pop("in", None), counts.pop("out", None)
    aside = {reason: n for reason, n in counts.items() if reason not in ("test in", "test out")}
    tokens = tokens or made.results.get("tokens")
    return StageSummary(node.path, made.stage, made.seconds, tokens, rate, took, gave, aside)
