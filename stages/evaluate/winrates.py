"""Win rates and their errors from preferences in [0, 1]: 1 the model wins, 0 the baseline wins.

Pure functions of arrays with one value per instruction. They follow AlpacaEval 2.0 (Dubois et al.
2024, "Length-Controlled AlpacaEval", arXiv 2404.04475), whose files hold 1 + preference.
"""

import dataclasses

import numpy as np
from etils import epy

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import sklearn
    from scipy import special, stats
    from sklearn import linear_model, metrics, model_selection

RESAMPLES = 10_000  # bootstrap samples
FOLDS = 5  # folds of the cross-validation that chooses the logistic model's regularisation
FEWEST = 4 * FOLDS  # the logistic model needs at least so many instructions
REGULARISATION = 0.2  # glm_winrate.py: regularize_to_baseline_lambda


@dataclasses.dataclass
class Summary:
    n: int
    wins: int
    ties: int
    losses: int
    win_rate: float  # the mean preference, so that a tie counts half
    standard_error: float | None  # of the win rate, over instructions; None for one instruction
    discrete_win_rate: float  # wins and half the ties per instruction, whatever the margins
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
    """The standard error of the mean of `values`; None for fewer than two."""
    return float(stats.sem(values)) if len(values) > 1 else None


def bootstrap_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95% percentile interval of the mean over RESAMPLES bootstrap samples."""
    if len(values) < 2:
        return float(values[0]), float(values[0])
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=500,  # all samples at once are 64 MB at AlpacaEval's size
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


@dataclasses.dataclass
class LengthControlled:
    """The win rate that answers as long as the baseline's would have; None, with the reason `why`,
    where it cannot be estimated."""

    win_rate: float | None
    why: str | None = None


@dataclasses.dataclass
class Gamed:
    """AlpacaEval's df_gamed.csv: preferences for the baseline's own answers after it was told to be
    verbose or concise. They pull the fit towards the effect of length alone; each row has the
    weight REGULARISATION / 2."""

    preferences: np.ndarray
    length_differences: np.ndarray  # in standard deviations
    difficulties: np.ndarray


def length_controlled(
    preferences: np.ndarray,
    lengths: np.ndarray,
    baseline_lengths: np.ndarray,
    difficulties: np.ndarray | None = None,
    gamed: Gamed | None = None,
) -> LengthControlled:
    """AlpacaEval's logistic model (metrics/glm_winrate.py), without an intercept:

        preference ~ tanh(length difference / its standard deviation) [+ difficulty] + 1

    It is fitted to this model's answers (and to the `gamed` ones, which need difficulties), and
    then evaluated with every length difference set to 0. Lengths are in characters. Without
    difficulties it is AlpacaEval's "length_controlled_minimal", which is not on its leaderboard.
    """
    differences = (baseline_lengths - lengths).astype(float)
    if len(preferences) < FEWEST:
        return LengthControlled(None, f"{len(preferences)} instructions: {FEWEST} are needed")
    spread = float(np.std(differences, ddof=1))
    if spread == 0:
        return LengthControlled(None, "all length differences are the same")
    if np.all(preferences == preferences[0]) and preferences[0] in (0, 1):
        return LengthControlled(None, "every comparison went the same way")
    features = _features(differences / spread, difficulties, model=1.0)
    train, targets, weights = features, preferences, np.ones(len(preferences))
    if gamed is not None:
        others = _features(gamed.length_differences, gamed.difficulties, model=0.0)
        train = np.concatenate([others, features])
        targets = np.concatenate([gamed.preferences, preferences])
        weights = np.concatenate([np.full(len(others), REGULARISATION / 2), weights])
    coefficients = _fit(train, targets, weights)
    features[:, 0] = 0.0
    return LengthControlled(float(np.mean(special.expit(features @ coefficients))))


def _features(differences: np.ndarray, difficulties: np.ndarray | None, model: float) -> np.ndarray:
    """[n, features]. model: 1 for the model's answers, 0 for the gamed baseline's."""
    columns = [np.tanh(differences), difficulties, np.full(len(differences), model)]
    return np.stack([column for column in columns if column is not None], axis=1)


def _fit(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients of an l1 logistic regression on targets in [0, 1]. Grouped cross-validation
    chooses the strength of the penalty, as in alpaca_eval's fit_LogisticRegressionCV.

    scikit-learn needs classes, so each row is entered twice: as class 1 with its target as the
    weight, and as class 0 with 1 − target. Both copies are in the same fold.
    """
    n = len(targets)
    shares = np.concatenate([targets, 1 - targets])
    weights = np.concatenate([weights, weights])
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = metrics.make_scorer(
            _log_loss, response_method="predict_proba", greater_is_better=False
        )
        scorer = scorer.set_score_request(shares=True, weights=True)
        model = linear_model.LogisticRegressionCV(
            cv=model_selection.GroupKFold(FOLDS),
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
    """The mean cross-entropy with the targets, not with the classes."""
    targets = np.where(classes == 1, shares, 1 - shares)
    predicted = np.clip(predicted, 1e-15, 1 - 1e-15)
    losses = targets * np.log(predicted) + (1 - targets) * np.log(1 - predicted)
    return float(-np.mean(losses * weights))
