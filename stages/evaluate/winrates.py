"""Win rates and how sure they are, of preferences in [0, 1]: 1 the model wins, 0 the baseline.

Pure functions of arrays, one value an instruction. They follow AlpacaEval 2.0 (Dubois et al. 2024,
"Length-Controlled AlpacaEval", arXiv 2404.04475), whose files hold 1 + preference.
"""

import dataclasses
import math

import numpy as np

RESAMPLES = 10_000  # of the bootstrap
FOLDS = 5  # of the cross-validation that chooses the logistic model's regularisation
FEWEST = 4 * FOLDS  # instructions that a logistic model is fitted to


@dataclasses.dataclass
class Summary:
    n: int
    wins: int
    ties: int
    losses: int
    win_rate: float  # the mean preference: ties count half, and so does half a preference
    standard_error: float | None  # of the win rate, over instructions; None for a single one
    discrete_win_rate: float  # of wins, ties half, whatever the margin
    interval: tuple[float, float]  # 95%, bootstrap over instructions


def summary(preferences: np.ndarray, seed: int = 0) -> Summary:
    n = len(preferences)
    wins, ties = int(np.sum(preferences > 0.5)), int(np.sum(preferences == 0.5))
    return Summary(
        n=n,
        wins=wins,
        ties=ties,
        losses=n - wins - ties,
        win_rate=float(np.mean(preferences)),
        standard_error=standard_error(preferences),
        discrete_win_rate=(wins + ties / 2) / n,
        interval=bootstrap_interval(preferences, seed),
    )


def standard_error(values: np.ndarray) -> float | None:
    """Of their mean, as pandas' `sem` gives it."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def bootstrap_interval(values: np.ndarray, seed: int, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the mean, drawn anew from the values RESAMPLES times."""
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):  # one by one: all at once is 64 MB at AlpacaEval's size
        means[i] = values[rng.integers(len(values), size=len(values))].mean()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclasses.dataclass
class LengthControlled:
    """What the win rate would be with answers as long as the baseline's; None where that cannot be
    estimated, and `why`."""

    win_rate: float | None
    why: str | None = None


@dataclasses.dataclass
class Gamed:
    """AlpacaEval's df_gamed.csv: answers of the baseline told to be verbose or concise, which pull
    the fit towards what length alone does (each of the two counts REGULARISATION / 2)."""

    preferences: np.ndarray
    length_differences: np.ndarray  # in standard deviations
    difficulties: np.ndarray


REGULARISATION = 0.2  # glm_winrate.py: regularize_to_baseline_lambda


def length_controlled(
    preferences: np.ndarray,
    lengths: np.ndarray,
    baseline_lengths: np.ndarray,
    difficulties: np.ndarray | None = None,
    gamed: Gamed | None = None,
) -> LengthControlled:
    """AlpacaEval's logistic model (metrics/glm_winrate.py), without an intercept:

        preference ~ tanh(length difference / its standard deviation) [+ difficulty] + 1

    fitted to this model's answers (and the `gamed` ones, which need difficulties), then asked with
    the difference at 0. Lengths are in characters. Without difficulties it is AlpacaEval's
    "length_controlled_minimal", which is no figure of its leaderboard.
    """
    differences = (baseline_lengths - lengths).astype(float)
    if len(preferences) < FEWEST:
        return LengthControlled(None, f"{len(preferences)} instructions: {FEWEST} are needed")
    spread = float(np.std(differences, ddof=1))
    if spread == 0:
        return LengthControlled(None, "all length differences are the same")
    if np.all(preferences == preferences[0]) and preferences[0] in (0, 1):
        return LengthControlled(None, "every comparison went the same way")
    features = _features(differences / spread, difficulties, 1.0)
    train, targets, weights = features, preferences, np.ones(len(preferences))
    if gamed is not None:
        others = _features(gamed.length_differences, gamed.difficulties, 0.0)
        train = np.concatenate([others, features])
        targets = np.concatenate([gamed.preferences, preferences])
        weights = np.concatenate([np.full(len(others), REGULARISATION / 2), weights])
    coefficients = _fit(train, targets, weights)
    features[:, 0] = 0.0
    return LengthControlled(float(np.mean(1 / (1 + np.exp(-features @ coefficients)))))


def _features(differences: np.ndarray, difficulties: np.ndarray | None, model: float) -> np.ndarray:
    """[n, features]. model: 1 for the answers in question, 0 for the gamed baseline's."""
    columns = [np.tanh(differences)]
    columns += [] if difficulties is None else [difficulties]
    return np.stack([*columns, np.full(len(differences), model)], axis=1)


def _fit(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients of an l1 logistic regression on targets in [0, 1], its strength chosen by
    grouped cross-validation, as alpaca_eval's fit_LogisticRegressionCV.

    scikit-learn wants classes: each row stands twice, as a 1 that weighs its target and as a 0 that
    weighs the rest; both are in the same fold.
    """
    import sklearn
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    n = len(targets)
    shares = np.concatenate([targets, 1 - targets])
    weights = np.concatenate([weights, weights])
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_scorer(_log_loss, response_method="predict_proba", greater_is_better=False)
        scorer = scorer.set_score_request(shares=True, weights=True)
        model = LogisticRegressionCV(
            cv=GroupKFold(FOLDS),
            scoring=scorer,
            random_state=123,
            l1_ratios=(1.0,),
            solver="liblinear",
            fit_intercept=False,
            use_legacy_attributes=False,
        ).set_fit_request(sample_weight=True)
        model.fit(
            np.concatenate([features, features]),
            np.repeat([1, 0], n),
            sample_weight=shares * weights,
            groups=np.tile(np.arange(n), 2),
            shares=shares,
            weights=weights,
        )
    return model.coef_[0]


def _log_loss(classes, predicted, shares, weights) -> float:
    """Of the targets, not of the classes."""
    targets = np.where(classes == 1, shares, 1 - shares)
    predicted = np.clip(predicted, 1e-15, 1 - 1e-15)
    losses = targets * np.log(predicted) + (1 - targets) * np.log(1 - predicted)
    return float(-np.mean(losses * weights))
