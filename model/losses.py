"""Preference losses: pure functions of a batch of pairs' log-probabilities, one loss a pair.

`Pairs` holds what they read; `Loss` names one of them with its constants. In the formulas π is the
policy and π_ref the frozen reference, c the chosen response and r the rejected one, |y| the tokens
of a response (its EOS included), h = (log π/π_ref)(c) − (log π/π_ref)(r), and σ the logistic
function.

Axis letter: b pair.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

Name = Literal["sigmoid", "robust", "ipo", "hinge", "sppo", "sigmoid_norm", "simpo"]


class Pairs(NamedTuple):
    """fp32 [b] each: log π summed over a response's tokens, under the policy and the reference; how
    many tokens; the probability that the chosen response beats the rejected one (1: for sure)."""

    pi_chosen: jax.Array
    pi_rejected: jax.Array
    ref_chosen: jax.Array
    ref_rejected: jax.Array
    chosen_tokens: jax.Array
    rejected_tokens: jax.Array
    win_probability: jax.Array


@dataclasses.dataclass(frozen=True)
class Loss:
    """One of `Name` with its constants; called with Pairs it gives the losses, fp32 [b]."""

    name: Name = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0  # ε: the assumed share of wrongly ordered pairs
    gamma: float = 0.0  # γ: SimPO's target margin
    nll_weight: float = 0.0  # α: of −log π(c) / |c|, added to any loss: Pang et al. 2024, Eq. 1

    def __post_init__(self):
        for name, ok, rule in (
            ("loss", self.name in get_args(Name), f"one of {', '.join(get_args(Name))}"),
            ("beta", self.beta > 0, "above 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "at least 0 and below 0.5"),
            (
                "label_smoothing",
                not self.label_smoothing or self.name in ("sigmoid", "robust"),
                f"0 with {self.name}: only sigmoid and robust know it",
            ),
            ("gamma", self.gamma >= 0, "at least 0"),
            ("gamma", not self.gamma or self.name == "simpo", f"0 with {self.name}: it is SimPO's"),
            ("nll_weight", self.nll_weight >= 0, "at least 0"),
        ):
            if not ok:
                value = self.name if name == "loss" else getattr(self, name)
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be {rule}")

    @property
    def needs_reference(self) -> bool:
        return self.name != "simpo"

    def __call__(self, p: Pairs) -> jax.Array:
        loss_b = FORMULAS[self.name](p, self)
        if self.nll_weight:
            loss_b = loss_b - self.nll_weight * p.pi_chosen / p.chosen_tokens
        return loss_b


def sigmoid(p: Pairs, c: Loss) -> jax.Array:
    """−log σ(βh): DPO, Rafailov et al. 2023, Eq. 7. With ε, (1 − ε)·loss(h) + ε·loss(−h): the
    conservative DPO of Mitchell 2023."""
    margin_b = c.beta * log_ratio_difference(p)
    return -(1 - c.label_smoothing) * jax.nn.log_sigmoid(margin_b) - (
        c.label_smoothing * jax.nn.log_sigmoid(-margin_b)
    )


def robust(p: Pairs, c: Loss) -> jax.Array:
    """((1 − ε)·loss(h) − ε·loss(−h)) / (1 − 2ε), unbiased where a share ε of the pairs is flipped:
    Chowdhury et al. 2024, Eq. 12."""
    margin_b, e = c.beta * log_ratio_difference(p), c.label_smoothing
    difference_b = e * jax.nn.log_sigmoid(-margin_b) - (1 - e) * jax.nn.log_sigmoid(margin_b)
    return difference_b / (1 - 2 * e)


def ipo(p: Pairs, c: Loss) -> jax.Array:
    """(h' − 1/(2β))², β being the paper's τ: Azar et al. 2023, Eq. 17. h' takes log-ratios a token,
    as TRL does on its authors' word; with sums the target would hang on the length."""
    return (_log_ratio_difference_a_token(p) - 1 / (2 * c.beta)) ** 2


def hinge(p: Pairs, c: Loss) -> jax.Array:
    """max(0, 1 − βh): SLiC-HF (Zhao et al. 2023) on log-ratios, Liu et al. 2023 (RSO), Eq. 11."""
    return jax.nn.relu(1 - c.beta * log_ratio_difference(p))


def sppo(p: Pairs, c: Loss) -> jax.Array:
    """(log π/π_ref (c) − η(P − ½))² + (log π/π_ref (r) − η(½ − P))² with η = 1/β and P the chosen
    one's win probability: Wu et al. 2024 (SPPO), Eq. 4.7 for the two answers of a pair."""
    target_b = (p.win_probability - 0.5) / c.beta
    chosen_b, rejected_b = p.pi_chosen - p.ref_chosen, p.pi_rejected - p.ref_rejected
    return (chosen_b - target_b) ** 2 + (rejected_b + target_b) ** 2


def sigmoid_norm(p: Pairs, c: Loss) -> jax.Array:
    """−log σ(βh') with log-ratios a token: length-normalised DPO, Lambert et al. 2024 (Tülu 3),
    Eq. 6. Its β is larger than DPO's by about a response's length."""
    return -jax.nn.log_sigmoid(c.beta * _log_ratio_difference_a_token(p))


def simpo(p: Pairs, c: Loss) -> jax.Array:
    """−log σ(β·(log π(c)/|c| − log π(r)/|r|) − γ), without a reference: Meng et al. 2024, Eq. 6."""
    margin_b = p.pi_chosen / p.chosen_tokens - p.pi_rejected / p.rejected_tokens
    return -jax.nn.log_sigmoid(c.beta * margin_b - c.gamma)


def log_ratio_difference(p: Pairs) -> jax.Array:
    """h, fp32 [b]."""
    return (p.pi_chosen - p.ref_chosen) - (p.pi_rejected - p.ref_rejected)


def _log_ratio_difference_a_token(p: Pairs) -> jax.Array:
    chosen_b = (p.pi_chosen - p.ref_chosen) / p.chosen_tokens
    return chosen_b - (p.pi_rejected - p.ref_rejected) / p.rejected_tokens


def implicit_rewards(pi_b: jax.Array, ref_b: jax.Array, beta: float) -> jax.Array:
    """β·(log π − log π_ref), fp32 [b]: the reward that DPO's policy is optimal for, up to a
    constant of the prompt. Rafailov et al. 2023, Eq. 5."""
    return jnp.asarray(beta * (pi_b - ref_b), jnp.float32)


FORMULAS = {f.__name__: f for f in (sigmoid, robust, ipo, hinge, sppo, sigmoid_norm, simpo)}
