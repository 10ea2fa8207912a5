"""Preference losses: pure functions of four vectors of summed log-probabilities, one loss a pair.

pi_*: log π(response | prompt) under the policy; ref_*: under the frozen reference; fp32 [b].
"""

import jax
import jax.numpy as jnp


def dpo_loss(
    pi_chosen_b: jax.Array,
    pi_rejected_b: jax.Array,
    ref_chosen_b: jax.Array,
    ref_rejected_b: jax.Array,
    beta: float,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """−log σ(β·[(π_c − ref_c) − (π_r − ref_r)]), fp32 [b]. Rafailov et al. 2023, Eq. 7.

    label_smoothing ε is the assumed share of wrongly ordered pairs: (1 − ε)·loss(margin) +
    ε·loss(−margin), the conservative DPO of Mitchell 2023.
    """
    margin_b = beta * ((pi_chosen_b - ref_chosen_b) - (pi_rejected_b - ref_rejected_b))
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin_b) - (
        label_smoothing * jax.nn.log_sigmoid(-margin_b)
    )


def implicit_rewards(pi_b: jax.Array, ref_b: jax.Array, beta: float) -> jax.Array:
    """β·(log π − log π_ref), fp32 [b]: the reward that DPO's policy is optimal for, up to a
    constant of the prompt. Rafailov et al. 2023, Eq. 5."""
    return jnp.asarray(beta * (pi_b - ref_b), jnp.float32)
