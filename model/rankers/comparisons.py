"""Which answers of a prompt are compared with which, and what the comparisons say. Without JAX.

A comparison (i, j) puts answer i first and j second; its logit says how far i beats j. A strategy
is a generator: it yields the comparisons it wants next, is sent their logits, and returns a
Ranking. This lets the caller (pairwise.py) run the strategies of many prompts at once and form
batches of their comparisons.

Answers with the same text count as one answer: their comparisons are made once.
"""

import hashlib
import random
from collections.abc import Generator
from typing import Literal

import numpy as np

from model.rankers.ranking import Ranking

Pair = tuple[int, int]
Strategy = Generator[list[Pair], dict[Pair, float], Ranking]
Comparisons = Literal["full", "bubble", "best"]
Aggregation = Literal["max_logits", "max_wins"]


def strategy(
    kind: Comparisons, texts: list[str], aggregation: Aggregation, prompt_id: str
) -> Strategy:
    if kind == "full":
        return full(texts, aggregation)
    return (bubble if kind == "bubble" else best)(texts, prompt_id)


# ------------------------------------------------------------------------------ strategies


def full(texts: list[str], aggregation: Aggregation) -> Strategy:
    """All n(n−1) ordered pairs; scores by `aggregation` (llm_blender/gpt_eval/utils.py)."""
    n, same = len(texts), _first_with_the_same(texts)
    wanted = {(i, j): (same[i], same[j]) for i in range(n) for j in range(n) if i != j}
    logits = (yield sorted(set(wanted.values()))) if wanted else {}
    matrix = np.zeros((n, n))
    for pair, asked in wanted.items():
        matrix[pair] = logits[asked]
    return Ranking(aggregate(matrix, aggregation), matrix.tolist())


def aggregate(matrix: np.ndarray, aggregation: Aggregation) -> list[float]:
    """Scores of n answers from their matrix [n, n] of logits, diagonal 0.

    max_logits: the mean over all n columns of C − Cᵀ, as in llm-blender. max_wins: comparisons won
    out of 2(n−1), in whichever order they were made.
    """
    if aggregation == "max_logits":
        return (matrix - matrix.T).mean(axis=-1).tolist()
    return ((matrix > 0).sum(axis=1) + (matrix < 0).sum(axis=0)).astype(float).tolist()


def bubble(texts: list[str], prompt_id: str) -> Strategy:
    """Only the best and the worst answer: scores 1 and −1, and 0 for all others.

    The best is found as in `best`. Then the answers that never won meet; the loser of each meeting
    meets the next, until the worst is left. Blank answers take no part if two others have text.
    """
    same, order = _first_with_the_same(texts), _meeting_order(texts, prompt_id)
    logits: dict[Pair, float] = {}
    best, winners = yield from _knockout(order, logits)
    losers = [i for i in order if i not in winners]
    worst = losers[0]
    for other in losers[1:]:
        logits |= yield [(worst, other), (other, worst)]
        worst = other if logits[worst, other] > logits[other, worst] else worst
    scores = [0.0 if best == worst else float((i == best) - (i == worst)) for i in same]
    return Ranking(scores, _matrix(same, logits))


def best(texts: list[str], prompt_id: str) -> Strategy:
    """Only the best answer, in 2(n−1) comparisons: score 1, and 0 for all others.

    Answers meet in an order drawn from the prompt_id; the winner meets the next one (as in
    llm-blender's get_best_of_n; at a tie the second wins). Two answers meet in both orders, and i
    wins if logit(i, j) > logit(j, i).
    """
    same, logits = _first_with_the_same(texts), {}
    winner, _ = yield from _knockout(_meeting_order(texts, prompt_id), logits)
    return Ranking([float(i == winner) for i in same], _matrix(same, logits))


def _meeting_order(texts: list[str], prompt_id: str) -> list[int]:
    """The different answers in an order drawn from the prompt_id, without the blank ones if two
    others have text (a blank answer makes no pair)."""
    order = sorted(set(_first_with_the_same(texts)))
    if sum(bool(texts[i].strip()) for i in order) > 1:
        order = [i for i in order if texts[i].strip()]
    seed = hashlib.sha256(prompt_id.encode("utf-8", "surrogatepass")).digest()
    random.Random(seed).shuffle(order)
    return order


def _knockout(
    order: list[int], logits: dict[Pair, float]
) -> Generator[list[Pair], dict[Pair, float], tuple[int, set[int]]]:
    """(the last winner, all answers that ever won); adds each comparison to `logits`."""
    ahead, winners = order[0], set()
    for other in order[1:]:
        logits |= yield [(ahead, other), (other, ahead)]
        ahead = ahead if logits[ahead, other] > logits[other, ahead] else other
        winners.add(ahead)
    return ahead, winners


def _matrix(same: list[int], logits: dict[Pair, float]) -> list[list[float | None]]:
    return [
        [0.0 if i == j else logits.get((a, b)) for j, b in enumerate(same)]
        for i, a in enumerate(same)
    ]


def _first_with_the_same(texts: list[str]) -> list[int]:
    first: dict[str, int] = {}
    return [first.setdefault(text, i) for i, text in enumerate(texts)]


# ------------------------------------------------------------------------------ the report


class Report:
    """Figures over all rankings of a run: `add` each ranked row, then read `results`."""

    def __init__(self):
        self._pairs = self._consistent = self._tied = self._cut = 0
        self._sums = np.zeros(3)  # sums of score², length² and their product
        self._cut_known = False

    def add(self, texts: list[str], ranking: Ranking):
        n = len(texts)
        offsets = np.array([ranking.scores, [len(text) for text in texts]], float)
        offsets -= offsets.mean(axis=1, keepdims=True)
        score, length = offsets
        self._sums += (score @ score, length @ length, score @ length)
        if ranking.comparisons is None:
            return
        compared = [
            (i, j)
            for i in range(n)
            for j in range(i)
            if ranking.comparisons[i][j] is not None and texts[i] != texts[j]
        ]
        for i, j in compared:
            first, swapped = ranking.comparisons[i][j], ranking.comparisons[j][i]
            self._consistent += first * swapped < 0
            self._tied += first == swapped
        self._pairs += len(compared)
        if ranking.truncated is not None:
            self._cut_known = True
            cut, prompt = ranking.truncated["responses"], ranking.truncated["prompt"]
            self._cut += sum(prompt or cut[i] or cut[j] for i, j in compared)

    def results(self) -> dict[str, float]:
        """Rates over the pairs of different answers that were compared, and the correlation of
        score and length in characters over all answers, both less their prompt's mean."""
        results = {}
        if self._pairs:
            results["pairs"] = self._pairs
            results["swap_consistency"] = self._consistent / self._pairs
            results["tie_rate"] = self._tied / self._pairs
            if self._cut_known:
                results["truncation_rate"] = self._cut / self._pairs
        scores, lengths, products = self._sums
        if scores > 0 and lengths > 0:
            results["score_length_correlation"] = float(products / np.sqrt(scores * lengths))
        return results
