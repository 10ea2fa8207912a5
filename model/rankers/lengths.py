"""How long answers are, and how length goes with score. Plain functions of numbers, without JAX.

Length decides much of what judges prefer (Dubois et al. 2024, arXiv:2404.04475), and DPO carries it
on (Park et al. 2024, arXiv:2403.19159), so stages.pairs keeps these figures in its manifest at each
iteration. Lengths are in characters, which every answer has, and in tokens where all answers carry
their ids.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

DECILES = np.arange(0, 101, 10)


def distribution(lengths: Sequence[int]) -> dict:
    """{"n", "mean", "deciles": the 0th, 10th, … 100th percentile}; only n where there is none."""
    if not len(lengths):
        return {"n": 0}
    deciles = np.percentile(lengths, DECILES).tolist()
    return {"n": len(lengths), "mean": float(np.mean(lengths)), "deciles": deciles}


def correlation(
    scores: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], ranks: bool = False
) -> float | None:
    """Pearson's correlation over all answers, both less their prompt's mean; None where one of the
    two never varies. One inner sequence a prompt, as scores are only comparable within one. With
    `ranks`, of the ranks within the prompt: Spearman's, which no outlier decides."""
    products = np.zeros(3)  # squared scores, squared lengths, and one times the other
    for pair in zip(scores, lengths, strict=True):
        if len(pair[0]) < 2:
            continue
        score, length = rankdata(pair, axis=1) if ranks else np.array(pair, float)
        score, length = score - score.mean(), length - length.mean()
        products += (score @ score, length @ length, score @ length)
    scores_squared, lengths_squared, both = products
    if not (scores_squared > 0 and lengths_squared > 0):
        return None
    return float(both / np.sqrt(scores_squared * lengths_squared))


def penalised(scores: Sequence[float], lengths: Sequence[int], penalty: float) -> np.ndarray:
    """z(score) − penalty · z(length), z being standardised within these answers to one prompt.

    A reward less a multiple of the length is how RLHF workflows keep answers from growing (Dong et
    al. 2024, arXiv:2405.07863, section 3; Park et al. 2024, whose term has the same form).
    Standardised, `penalty` means the same for every ranker and prompt: so many standard deviations
    of score does one standard deviation of length cost.
    """
    return _standardised(scores) - penalty * _standardised(lengths)


def _standardised(values: Sequence[float]) -> np.ndarray:
    offsets = np.array(values, float) - np.mean(values)
    deviation = offsets.std()
    return offsets / deviation if deviation > 0 else np.zeros(len(offsets))


class LengthReport:
    """The lengths of a file of pairs: `add` each ranked row, then read `results`."""

    def __init__(self):
        self._scores: list[list[float]] = []
        self._characters: list[list[int]] = []
        self._tokens: list[list[int]] = []
        self._picked: list[
            tuple[int, int] | None
        ] = []  # chosen and rejected, where there is a pair
        self._tokens_known = True

    def add(self, responses: list[dict], scores: list[float], picked: tuple[int, int] | None):
        self._scores.append(scores)
        self._characters.append([len(response["text"]) for response in responses])
        self._tokens_known &= all(response.get("token_ids") is not None for response in responses)
        if self._tokens_known:
            self._tokens.append([len(response["token_ids"]) for response in responses])
        self._picked.append(picked)

    def results(self) -> dict:
        """{"lengths": {"characters": {"sampled", "chosen", "rejected": distributions, "gap": the
        mean of chosen less rejected}, "tokens": the same, where known}, and the two correlations of
        score and length in characters}."""
        lengths = {"characters": self._of(self._characters)}
        if self._tokens_known and self._tokens:
            lengths["tokens"] = self._of(self._tokens)
        found = {"lengths": lengths}
        for name, ranks in (
            ("score_length_correlation", False),
            ("score_length_rank_correlation", True),
        ):
            value = correlation(self._scores, self._characters, ranks)
            if value is not None:
                found[name] = value
        return found

    def _of(self, lengths: list[list[int]]) -> dict:
        chosen, rejected = (
            [row[picked[side]] for row, picked in zip(lengths, self._picked) if picked is not None]
            for side in (0, 1)
        )
        found = {"sampled": distribution([n for row in lengths for n in row])}
        found |= {"chosen": distribution(chosen), "rejected": distribution(rejected)}
        if chosen:
            found["gap"] = float(np.mean(chosen) - np.mean(rejected))
        return found
