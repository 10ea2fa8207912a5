"""The lengths of answers, and how they correlate with scores. Runs without JAX.

Judges prefer longer answers (Dubois et al. 2024, arXiv:2404.04475), and DPO amplifies that (Park et
al. 2024, arXiv:2403.19159), so stages.pairs keeps these figures in its manifest at each iteration.
Lengths are in characters, and also in tokens where every answer carries its token ids.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

DECILES = np.arange(0, 101, 10)


def distribution(lengths: Sequence[int]) -> dict:
    """{"n", "mean", "deciles": the 0th, 10th, … 100th percentile}; {"n": 0} without lengths."""
    if not len(lengths):
        return {"n": 0}
    deciles = np.percentile(lengths, DECILES).tolist()
    return {"n": len(lengths), "mean": float(np.mean(lengths)), "deciles": deciles}


def correlation(
    scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], ranks: bool = False
) -> float | None:
    """Pearson's correlation of score and length over all answers, after subtracting each prompt's
    mean; None where scores or lengths never vary.

    One inner sequence per prompt, since scores are comparable only within a prompt. With `ranks`,
    values are replaced by their ranks within the prompt, so that no outlier decides (Spearman's).
    """

    def centred(pair) -> np.ndarray:
        values = np.array(pair, float)
        values = stats.rankdata(values, axis=1) if ranks else values
        return values - values.mean(axis=1, keepdims=True)

    parts = [centred(pair) for pair in zip(scores, lengths, strict=True) if len(pair[0])]
    if not parts:
        return None
    offsets = np.concatenate(parts, axis=1)
    if not offsets.any(axis=1).all():
        return None
    return float(stats.pearsonr(*offsets).statistic)


def penalised(scores: Sequence[float], lengths: Sequence[int], penalty: float) -> np.ndarray:
    """z(score) − penalty · z(length), standardised over these answers to one prompt.

    Subtracting a multiple of the length from the reward keeps answers from growing (Dong et al.
    2024, arXiv:2405.07863, section 3; Park et al. 2024 have a term of the same form). After
    standardisation `penalty` means the same for every ranker and prompt: one standard deviation of
    length costs `penalty` standard deviations of score.
    """
    return _standardised(scores) - penalty * _standardised(lengths)


def _standardised(values: Sequence[float]) -> np.ndarray:
    offsets = np.array(values, float) - np.mean(values)
    deviation = offsets.std()
    return offsets / deviation if deviation > 0 else np.zeros(len(offsets))


class LengthReport:
    """The lengths of the answers in a file of pairs: `add` each ranked row, then call `results`."""

    def __init__(self):
        self._scores: list[list[float]] = []
        self._characters: list[list[int]] = []
        self._tokens: list[list[int]] | None = []  # None once an answer came without token ids
        self._picked: list[tuple[int, int] | None] = []  # indices of chosen and rejected

    def add(self, responses: list[dict], scores: list[float], picked: tuple[int, int] | None):
        """picked: the indices of the chosen and the rejected response; None without a pair."""
        self._scores.append(scores)
        self._characters.append([len(response["text"]) for response in responses])
        token_ids = [response.get("token_ids") for response in responses]
        if None in token_ids:
            self._tokens = None
        if self._tokens is not None:
            self._tokens.append([len(ids) for ids in token_ids])
        self._picked.append(picked)

    def results(self) -> dict:
        """{"lengths": {"characters": {"sampled", "chosen", "rejected": distributions, "gap": the
        mean length of chosen less that of rejected}, "tokens": the same}, and the correlations of
        score and length in characters}; without what cannot be computed."""
        lengths = {"characters": self._lengths_of(self._characters)}
        if self._tokens:
            lengths["tokens"] = self._lengths_of(self._tokens)
        both = self._scores, self._characters
        correlations = {
            "score_length_correlation": correlation(*both),
            "score_length_rank_correlation": correlation(*both, ranks=True),
        }
        return {"lengths": lengths} | {k: x for k, x in correlations.items() if x is not None}

    def _lengths_of(self, lengths: list[list[int]]) -> dict:
        picked = [(row, pair) for row, pair in zip(lengths, self._picked) if pair is not None]
        chosen, rejected = ([row[pair[side]] for row, pair in picked] for side in (0, 1))
        figures = {
            "sampled": distribution([n for row in lengths for n in row]),
            "chosen": distribution(chosen),
            "rejected": distribution(rejected),
        }
        return figures | ({"gap": float(np.mean(chosen) - np.mean(rejected))} if picked else {})
