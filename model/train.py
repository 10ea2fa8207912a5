"""The optimizer and the jitted DPO step.

A step over many pairs is a sum of micro-batches: `accumulate` adds one micro-batch's gradient in
fp32, `apply` clips the sum and updates. Parameters, gradients and moments are donated from call to
call, so that none of them exists twice.

Axis letters: p pair, n response.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from model import decoder
from model.config import DecoderConfig
from model.logprobs import response_logprobs
from model.losses import Loss, Pairs, implicit_rewards

Batch = dict  # of arrays: see model/packing.py, which makes them


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is optimised and how."""

    loss: Loss
    learning_rate: float
    schedule: Literal["linear", "cosine", "constant"]
    warmup_ratio: float
    optimizer: Literal["adamw", "rmsprop"]
    weight_decay: float
    max_grad_norm: float


def learning_rate(recipe: Recipe, total_steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, …: linear warm-up from 0, then linear or cosine decay to 0.

    The values of transformers' get_{linear,cosine,constant}_schedule_with_warmup, its first step
    at 0 included; warm-up is ceil(warmup_ratio · total_steps) steps, as its Trainer counts them.
    """
    warmup = -int(-recipe.warmup_ratio * total_steps // 1)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rise = step / max(1, warmup)
        done = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0, 1)
        fall = {
            "linear": 1 - done,
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "constant": jnp.ones_like(done),
        }[recipe.schedule]
        return recipe.learning_rate * jnp.where(step < warmup, rise, fall)

    return schedule


def optimizer(recipe: Recipe, total_steps: int) -> optax.GradientTransformation:
    """torch's AdamW (betas 0.9, 0.999) or RMSprop (alpha 0.99), eps 1e-8 outside the root; weight
    decay only on matrices, never on norms."""
    schedule = learning_rate(recipe, total_steps)
    if recipe.optimizer == "adamw":
        return optax.adamw(
            schedule, 0.9, 0.999, 1e-8, weight_decay=recipe.weight_decay, mask=_is_matrix
        )
    return optax.chain(
        optax.add_decayed_weights(recipe.weight_decay, mask=_is_matrix),
        optax.rmsprop(schedule, decay=0.99, eps=1e-8, eps_in_sqrt=False),
    )


def _is_matrix(params: decoder.Params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in path[-1].key, params)


def optimizer_shardings(tx: optax.GradientTransformation, params, shardings, replicated):
    """Shardings of tx's state: a moment lies as its parameter does, a counter everywhere."""
    state = jax.eval_shape(tx.init, params)
    return optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated,
    )


# ------------------------------------------------------------------------------- the step


def pair_logprobs(
    params, config: DecoderConfig, batch: Batch, pairs: int, dtype, remat: decoder.Remat
):
    """Summed log-probs (chosen_p, rejected_p), fp32 [p], of a micro-batch of up to `pairs` pairs:
    the sequences of model/packing.py with two responses each, chosen and rejected."""
    found_n = response_logprobs(params, config, batch, 2 * pairs, dtype, remat)
    return found_n[0::2], found_n[1::2]


def _accumulate(params, gradients, batch, sides, pairs, *, config, recipe, dtype, remat):
    """gradients (None: nothing yet) + ∂(Σ weighted loss / pairs), and the values, one per pair.

    batch: see pair_logprobs; sides: fp32 [p] each, what `losses.Pairs` needs beside the policy's
    log-probs, and `weights`: 0 where the micro-batch has fewer pairs. `pairs`: real pairs in the
    whole step.
    """
    sides = dict(sides)
    weights_p = sides.pop("weights")

    def loss_of(params):
        chosen_p, rejected_p = pair_logprobs(params, config, batch, len(weights_p), dtype, remat)
        p = Pairs(chosen_p, rejected_p, **sides)
        loss_p = recipe.loss(p)
        values = {
            "loss": loss_p,
            "logps/chosen": chosen_p,
            "logps/rejected": rejected_p,
            "rewards/chosen": implicit_rewards(chosen_p, p.ref_chosen, recipe.loss.beta),
            "rewards/rejected": implicit_rewards(rejected_p, p.ref_rejected, recipe.loss.beta),
        }
        return jnp.sum(weights_p * loss_p) / pairs, values

    new, values = jax.grad(loss_of, has_aux=True)(params)
    return new if gradients is None else jax.tree.map(jnp.add, gradients, new), values


def _apply(params, state, gradients, norm, *, tx, max_norm):
    """Clip to the global norm `max_norm`, where `norm` is the gradients', and update. Returns
    (params, optimizer state, the share of the weights whose bfloat16 rounding has changed)."""
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))  # torch's clip_grad_norm_
    clipped = jax.tree.map(lambda g: g * scale, gradients)
    updates, state = tx.update(clipped, state, params)
    new = optax.apply_updates(params, updates)
    changed = jax.tree.map(
        lambda a, b: jnp.sum(a.astype(jnp.bfloat16) != b.astype(jnp.bfloat16), dtype=jnp.float32),
        params,
        new,
    )
    total = float(sum(x.size for x in jax.tree.leaves(params)))  # too many for an int32
    return new, state, sum(jax.tree.leaves(changed)) / total


class Trainer:
    """The compiled functions of a run, under the current mesh (`jax.set_mesh`).

    `logprobs(params, batch, pairs)`, `accumulate(params, gradients, batch, sides, pairs)`,
    `norm(gradients)`, `apply(params, optimizer_state, gradients, norm)`, `init_optimizer(params)`.
    A batch has a multiple of `batch_shards(mesh)` rows.
    """

    def __init__(
        self,
        config,
        recipe: Recipe,
        total_steps: int,
        shardings,
        replicated,
        dtype=jnp.float32,
        remat: decoder.Remat = "none",
    ):
        tx = optimizer(recipe, total_steps)
        self.schedule = learning_rate(recipe, total_steps)
        self.optimizer_shardings = optimizer_shardings(
            tx, decoder.abstract(config), shardings, replicated
        )
        self.optimizer_shapes = jax.eval_shape(tx.init, decoder.abstract(config))
        self.logprobs = jax.jit(
            partial(pair_logprobs, config=config, dtype=dtype, remat="none"),
            static_argnames="pairs",
            out_shardings=replicated,
        )
        self.accumulate = jax.jit(
            partial(_accumulate, config=config, recipe=recipe, dtype=dtype, remat=remat),
            donate_argnames="gradients",
            out_shardings=(shardings, replicated),
        )
        self.norm = jax.jit(optax.tree.norm, out_shardings=replicated)
        self.apply = jax.jit(
            partial(_apply, tx=tx, max_norm=recipe.max_grad_norm),
            donate_argnums=(0, 1),
            out_shardings=(shardings, self.optimizer_shardings, replicated),
        )
        self.init_optimizer = jax.jit(tx.init, out_shardings=self.optimizer_shardings)
