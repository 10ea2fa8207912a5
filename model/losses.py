"""Preference losses: pure functions of log-probabilities, one loss per pair.

`Pairs` holds what they read, `Loss` names one of them with its constants, and `pair_loss` is what
model/train.py differentiates. In the formulas π is the policy and π_ref the frozen reference, c the
chosen response and r the rejected one, |y| the number of tokens of a response (EOS included),
h = (log π/π_ref)(c) − (log π/π_ref)(r), and σ the logistic function.

Axis letters: b pair, n response.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from model.config import DecoderConfig
from model.forward import Remat
from model.logprobs import response_logprobs
from model.precision import Precision
from sharding.errors import UserError

Name = Literal["sigmoid", "robust", "ipo", "hinge", "sppo", "sigmoid_norm", "simpo"]


class Pairs(NamedTuple):
    """fp32 [b] each: log-probs summed over a response's tokens, of the policy (pi) and of the
    reference; numbers of tokens; the probability that the chosen response beats the rejected one
    (1: certain)."""

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
    nll_weight: float = 0.0  # α: α·(−log π(c) / |c|) is added. Pang et al. 2024, Eq. 1

    def __post_init__(self):
        for name, ok, rule in (
            ("loss", self.name in get_args(Name), f"one of {', '.join(get_args(Name))}"),
            ("beta", 0 < self.beta < math.inf, "above 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "at least 0 and below 0.5"),
            (
                "label_smoothing",
                not self.label_smoothing or self.name in ("sigmoid", "robust"),
                f"0 with {self.name}: only sigmoid and robust use it",
            ),
            ("gamma", 0 <= self.gamma < math.inf, "at least 0"),
            ("gamma", not self.gamma or self.name == "simpo", f"0 with {self.name}: it is SimPO's"),
            ("nll_weight", 0 <= self.nll_weight < math.inf, "at least 0"),
        ):
            if not ok:
                value = self.name if name == "loss" else getattr(self, name)
                raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {rule}")

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
    """((1 − ε)·loss(h) − ε·loss(−h)) / (1 − 2ε): unbiased where a share ε of the pairs is flipped.
    Chowdhury et al. 2024, Eq. 12."""
    margin_b, e = c.beta * log_ratio_difference(p), c.label_smoothing
    difference_b = e * jax.nn.log_sigmoid(-margin_b) - (1 - e) * jax.nn.log_sigmoid(margin_b)
    return difference_b / (1 - 2 * e)


def ipo(p: Pairs, c: Loss) -> jax.Array:
    """(h' − 1/(2β))², with β for the paper's τ: Azar et al. 2023, Eq. 17. h' takes log-ratios per
    token, as TRL does on the authors' advice; with sums, the target would depend on the length."""
    return (_log_ratio_difference_per_token(p) - 1 / (2 * c.beta)) ** 2


def hinge(p: Pairs, c: Loss) -> jax.Array:
    """max(0, 1 − βh): SLiC-HF (Zhao et al. 2023) on log-ratios, Liu et al. 2023 (RSO), Eq. 11."""
    return jax.nn.relu(1 - c.beta * log_ratio_difference(p))


def sppo(p: Pairs, c: Loss) -> jax.Array:
    """(log π/π_ref (c) − η(P − ½))² + (log π/π_ref (r) − η(½ − P))² with η = 1/β and P the
    probability that c wins: Wu et al. 2024 (SPPO), Eq. 4.7 for the two responses of a pair."""
    target_b = (p.win_probability - 0.5) / c.beta
    chosen_b, rejected_b = p.pi_chosen - p.ref_chosen, p.pi_rejected - p.ref_rejected
    return (chosen_b - target_b) ** 2 + (rejected_b + target_b) ** 2


def sigmoid_norm(p: Pairs, c: Loss) -> jax.Array:
    """−log σ(βh') with log-ratios per token: length-normalised DPO, Lambert et al. 2024 (Tülu 3),
    Eq. 6. Its β is larger than DPO's by about the length of a response."""
    return -jax.nn.log_sigmoid(c.beta * _log_ratio_difference_per_token(p))


def simpo(p: Pairs, c: Loss) -> jax.Array:
    """−log σ(β·(log π(c)/|c| − log π(r)/|r|) − γ), without a reference: Meng et al. 2024, Eq. 6."""
    margin_b = p.pi_chosen / p.chosen_tokens - p.pi_rejected / p.rejected_tokens
    return -jax.nn.log_sigmoid(c.beta * margin_b - c.gamma)


def log_ratio_difference(p: Pairs) -> jax.Array:
    """h, fp32 [b]."""
    return (p.pi_chosen - p.ref_chosen) - (p.pi_rejected - p.ref_rejected)


def _log_ratio_difference_per_token(p: Pairs) -> jax.Array:
    chosen_b = (p.pi_chosen - p.ref_chosen) / p.chosen_tokens
    return chosen_b - (p.pi_rejected - p.ref_rejected) / p.rejected_tokens


FORMULAS = {f.__name__: f for f in (sigmoid, robust, ipo, hinge, sppo, sigmoid_norm, simpo)}


def implicit_rewards(pi_b: jax.Array, ref_b: jax.Array, beta: float) -> jax.Array:
    """β·(log π − log π_ref), fp32 [b]: the reward for which DPO's policy is optimal, up to a
    constant per prompt. Rafailov et al. 2023, Eq. 5."""
    return jnp.asarray(beta * (pi_b - ref_b), jnp.float32)


# --------------------------------------------------------------------------------- training


def pair_logprobs(
    params, batch, *, config: DecoderConfig, pairs: int, precision: Precision, remat: Remat = "none"
) -> tuple[jax.Array, jax.Array]:
    """(chosen_b, rejected_b), fp32 [pairs]: summed log-probs of a micro-batch of up to `pairs`
    pairs. Its sequences (model/packing.py) have two responses each, first the chosen one."""
    logprobs_n = response_logprobs(params, config, batch, 2 * pairs, precision, remat)
    return logprobs_n[0::2], logprobs_n[1::2]


def pair_loss(
    params, batch, *, loss: Loss, config: DecoderConfig, precision: Precision, remat: Remat = "none"
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(losses, metrics), fp32 [b] each, of a micro-batch: the loss function of a DPO training.
    The batch holds, beside the tokens, the fields of `Pairs` that are not the policy's."""
    pairs = len(batch["weights"])
    chosen_b, rejected_b = pair_logprobs(
        params, batch, config=config, pairs=pairs, precision=precision, remat=remat
    )
    p = Pairs(chosen_b, rejected_b, *(batch[name] for name in Pairs._fields[2:]))
    values = pair_values(loss, p)
    return values["loss"], values | {
        "log_ratios/chosen": (chosen_b - p.ref_chosen) / p.chosen_tokens,
        "log_ratios/rejected": (rejected_b - p.ref_rejected) / p.rejected_tokens,
    }


def pair_values(loss: Loss, p: Pairs) -> dict[str, jax.Array]:
    """{name: fp32 [b]} of the metrics that are means over pairs, under TRL's names."""
    return {
        "loss": loss(p),
        "logps/chosen": p.pi_chosen,
        "logps/rejected": p.pi_rejected,
        "rewards/chosen": implicit_rewards(p.pi_chosen, p.ref_chosen, loss.beta),
        "rewards/rejected": implicit_rewards(p.pi_rejected, p.ref_rejected, loss.beta),
    }


def metrics(values: dict[str, np.ndarray]) -> dict[str, float]:
    """The means over pairs of what `pair_values` or `pair_loss` gives."""
    margins_b = values["rewards/chosen"] - values["rewards/rejected"]
    values = values | {"rewards/margins": margins_b, "rewards/accuracies": margins_b > 0}
    if "log_ratios/chosen" in values:
        # The reference drew the responses, so −log π/π_ref estimates the KL without bias.
        values["kl"] = -(values["log_ratios/chosen"] + values["log_ratios/rejected"]) / 2
    return {name: float(np.mean(value)) for name, value in values.items()}
