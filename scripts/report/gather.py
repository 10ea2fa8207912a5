"""What is known about a run of scripts/iterate.sh, read from its files: the one source of the
table in the terminal and of the page. What is not there yet is None, or empty."""

import dataclasses
import json
from collections import Counter
from functools import cached_property

import numpy as np
from etils import epath

from scripts.report import graph as lineage
from sharding.errors import UserError
from stages.evaluate.answers import conversation_key
from stages.evaluate.winrates import standard_error
from stages.files.rows import Row, messages_of, read_rows

Z = 1.959964  # 97.5% quantile of the normal distribution


@dataclasses.dataclass
class Model:
    """The start model, or what an iteration made, and its answers to the held-out prompts."""

    name: str  # the folder's: start, iteration_1, …
    rows: list[Row]  # heldout.ranked.jsonl, or heldout.samples.jsonl before it is ranked
    against_start: Row | None  # of `evaluate compare`
    against_previous: Row | None
    kl_to_start: Row | None  # of `evaluate kl`
    kl_to_previous: Row | None
    metrics: list[Row]  # of the training that made it, a row a step

    @cached_property
    def texts(self) -> list[str]:
        return [response["text"] for row in self.rows for response in row["responses"]]

    @cached_property
    def relative(self) -> bool:
        """A pairwise ranker's scores say how an answer does against the others of its row, not how
        good it is."""
        return any("comparisons" in row for row in self.rows)

    @cached_property
    def scores(self) -> list[float]:
        """A prompt's mean score, for each prompt; empty where scores say nothing of a model."""
        return (
            []
            if self.relative
            else [float(np.mean(r["scores"])) for r in self.rows if r.get("scores")]
        )

    def reward(self) -> tuple[float, float] | None:
        """(mean, half width of its 95% interval) of the prompts' mean scores."""
        if len(self.scores) < 2:
            return None
        return float(np.mean(self.scores)), Z * standard_error(np.array(self.scores))

    def words(self) -> float | None:
        return float(np.mean([len(text.split()) for text in self.texts])) if self.texts else None

    def finished(self) -> float | None:
        """The share of answers that the model ended itself."""
        if not self.texts:
            return None
        reasons = [r.get("finish_reason") for row in self.rows for r in row["responses"]]
        return float(np.mean([reason == "stop" for reason in reasons]))

    def distinct(self) -> float | None:
        """Different texts among all answers, as a share of them: 1 unless answers repeat others."""
        return len(set(self.texts)) / len(self.texts) if self.texts else None

    def terms(self) -> dict[str, float]:
        """The mean of each term that the reward function tells its scores consist of."""
        each = [terms for row in self.rows for terms in row.get("score_terms", [])]
        return {name: float(np.mean([t[name] for t in each])) for name in (each[0] if each else {})}

    def training(self, name: str) -> float | None:
        """A metric of its training: the mean over the second half of the steps."""
        values = [row[name] for row in self.metrics if name in row]
        return float(np.mean(values[len(values) // 2 :])) if values else None


@dataclasses.dataclass
class Trained:
    """What an iteration was trained on: of each answer and of each pair's two."""

    name: str
    scores: list[float] = dataclasses.field(default_factory=list)
    distinct: float | None = None  # different answers to a prompt, as a share of them, mean
    finished: float | None = None
    pairs: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """chosen_score, rejected_score, chosen_characters, rejected_characters: one a pair"""
    tokens: Counter = dataclasses.field(default_factory=Counter)  # file → tokens of answers


@dataclasses.dataclass
class Stage:
    """What a stage of the run wrote, what it took, and what it left out."""

    path: str
    name: str
    seconds: float | None
    tokens: int | None
    rate: float | None  # tokens a second, as the stage itself measured it
    took: int | None  # rows
    gave: int | None
    aside: dict[str, int]  # reason → rows


@dataclasses.dataclass
class Run:
    name: str
    settings: str
    models: list[Model]  # the start model first; those that have answers to the held-out prompts
    trained: list[Trained]
    graph: list[lineage.Node]
    stages: list[Stage]


def models(run: str) -> list[Model]:
    """The models of the run, as far as it went. Raises UserError where `run` is no run."""
    folder = epath.Path(run)
    found = []
    for place in _places(folder):
        rows = _rows(place / "heldout.ranked.jsonl") or _rows(place / "heldout.samples.jsonl")
        start, kl = (_json(place / f"{name}_start.json") for name in ("against", "kl_to"))
        first = place.name == "iteration_1"  # whose previous model is the start
        model = Model(
            place.name,
            rows,
            start,
            start if first else _json(place / "against_previous.json"),
            kl,
            kl if first else _json(place / "kl_to_previous.json"),
            _rows(place / "checkpoint.log/metrics.jsonl"),
        )
        if rows or model.metrics:
            found.append(model)
    return found


def read(run: str) -> Run:
    """All of it: every file of the run is read once. Raises UserError where `run` is no run."""
    folder = epath.Path(run)
    found = models(run)
    trained = [_trained(place) for place in _places(folder) if place.name != "start"]
    trained = [t for t in trained if t.scores or t.pairs]
    tokens = {f"{t.name}/{file}": n for t in trained for file, n in t.tokens.items()}
    for model in found:
        tokens[f"{model.name}/heldout.samples.jsonl"] = sum(
            len(r.get("token_ids", [])) for row in model.rows for r in row["responses"]
        )
    graph = lineage.read(run)
    settings = folder / "settings"
    return Run(
        name=folder.name,
        settings=settings.read_text().strip() if settings.exists() else "",
        models=found,
        trained=trained,
        graph=graph,
        stages=[_stage(node, tokens) for node in graph if node.manifest],
    )


def preferences(compared: Row | None) -> dict[str, float]:
    """Instruction → 1 where the model won, 0.5 at a tie, 0 where it lost."""
    rows = compared["per_instruction"] if compared else []
    return {row["instruction"]: row["preference"] for row in rows}


def instruction(row: Row) -> str:
    """As `evaluate compare` names a row's prompt."""
    return conversation_key(messages_of(row, "held-out prompts"))


# ---------------------------------------------------------------------------------- reading


def _places(folder) -> list:
    """start/ and iteration_K/, in order."""
    if not (folder / "start").is_dir():
        raise UserError(
            f"{folder} is no run: give the folder runs/NAME that scripts/iterate.sh makes"
        )
    iterations = [p for p in folder.glob("iteration_*") if p.name[10:].isdigit()]
    return [folder / "start", *sorted(iterations, key=lambda p: int(p.name[10:]))]


def _rows(path) -> list[Row]:
    return [row for _, row in read_rows(str(path))] if path.exists() else []


def _json(path) -> Row | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): remove it, and run the loop again") from None


def _trained(place) -> Trained:
    found = Trained(place.name)
    distinct, reasons = [], []
    ranked = place / "ranked.jsonl"
    for _, row in read_rows(str(ranked)) if ranked.exists() else ():
        found.scores += row["scores"]
        texts = [response["text"] for response in row["responses"]]
        distinct.append(len(set(texts)) / max(1, len(texts)))
        reasons += [response.get("finish_reason") == "stop" for response in row["responses"]]
        found.tokens["samples.jsonl"] += sum(len(r.get("token_ids", [])) for r in row["responses"])
    if distinct:
        found.distinct, found.finished = float(np.mean(distinct)), float(np.mean(reasons))
    pairs = place / "pairs.jsonl"
    for _, row in read_rows(str(pairs)) if pairs.exists() else ():
        for side in ("chosen", "rejected"):
            score = row["all_rm_scores"][row[f"{side}_index"]]
            found.pairs.setdefault(f"{side}_score", []).append(score)
            length = len(row[side][-1]["content"])
            found.pairs.setdefault(f"{side}_characters", []).append(length)
        names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
        found.tokens["checkpoint"] += sum(len(row.get(name, [])) for name in names)
    return found


def _stage(node: lineage.Node, tokens: dict[str, int]) -> Stage:
    made, counted = node.manifest, tokens.get(node.path)
    counts, rate = Counter(made.counts), None
    if made.stage == "sample" and (sitting := made.results.get("last_sitting")):
        rate = sitting["tokens"] / max(sitting["seconds"], 0.1)
    elif made.stage == "dpo" and counted:  # its cuts to lengths are not taken off
        counted *= made.arguments["epochs"]
        rate = counted / max(made.results["train_seconds"], 0.1)
    took, gave = counts.pop("in", None), counts.pop("out", None)
    aside = {reason: n for reason, n in counts.items() if reason not in ("test in", "test out")}
    counted = counted or made.results.get("tokens")
    return Stage(node.path, made.stage, made.seconds, counted, rate, took, gave, aside)
