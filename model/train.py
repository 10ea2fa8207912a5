"""The optimizer and the jitted training step, for any loss.

`loss(params, batch)` gives one loss per example and other values per example. A step is a sum over
micro-batches: `accumulate` adds the gradient of one micro-batch in fp32, `apply` clips the sum and
updates. Parameters, gradients and moments are donated from call to call, so that none of them
exists twice.

Axis letter: e example.
"""

import dataclasses
import math
import resource
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from model.batches import Batcher, MicroBatch, ahead
from sharding import chips
from sharding.mesh import placed_batch, put_batch, replicated

# (parameters, batch) → (losses [e], {name: values [e]}). The batch holds the arrays of
# model/packing.py and the sides of its examples (model/batches.py).
LossFunction = Callable[[dict, dict], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Optimization:
    """How the parameters are updated. stages/dpo.py explains each field as a flag."""

    learning_rate: float
    schedule: Literal["linear", "cosine", "constant"]
    warmup_ratio: float
    optimizer: Literal["adamw", "rmsprop"]
    weight_decay: float
    max_grad_norm: float


def learning_rate(optimization: Optimization, total_steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, …: linear warm-up from 0, then linear or cosine decay to 0, as
    transformers' get_{linear,cosine,constant}_schedule_with_warmup. Warm-up takes
    ceil(warmup_ratio · total_steps) steps, as in transformers' Trainer."""
    warmup = math.ceil(optimization.warmup_ratio * total_steps)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rise = step / max(1, warmup)
        done = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0, 1)
        fall = {
            "linear": 1 - done,
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "constant": jnp.ones_like(done),
        }[optimization.schedule]
        return optimization.learning_rate * jnp.where(step < warmup, rise, fall)

    return schedule


def optimizer(optimization: Optimization, total_steps: int) -> optax.GradientTransformation:
    """torch's AdamW (betas 0.9, 0.999) or RMSprop (alpha 0.99), eps 1e-8 outside the root. Weight
    decay applies to matrices only, not to norms."""
    schedule = learning_rate(optimization, total_steps)
    decay = optimization.weight_decay
    if optimization.optimizer == "adamw":
        return optax.adamw(schedule, 0.9, 0.999, 1e-8, weight_decay=decay, mask=_is_matrix)
    return optax.chain(
        optax.add_decayed_weights(decay, mask=_is_matrix),
        optax.rmsprop(schedule, decay=0.99, eps=1e-8, eps_in_sqrt=False),
    )


def _is_matrix(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in path[-1].key, params)


def optimizer_state(tx: optax.GradientTransformation, params):
    """Shapes and shardings of tx's state, nothing allocated: each moment lies as its parameter
    does, a counter lies whole on every device. params: shapes with shardings."""
    return optax.tree_map_params(
        tx,
        lambda x, param: x.update(sharding=param.sharding),
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda x: x.update(sharding=replicated(_mesh(params))),
    )


def arrays_held(optimization: Optimization, params, batch: dict) -> dict:
    """{title: arrays} that a training holds, apart from activations, for sharding/table.py.
    params, batch: arrays or shapes; those of params have shardings."""
    return {
        "parameters": params,
        "gradients": params,
        "optimizer state": optimizer_state(optimizer(optimization, total_steps=1), params),
        "batch": placed_batch(_mesh(params), batch),
    }


def _mesh(params):
    return jax.tree.leaves(params)[0].sharding.mesh


# ------------------------------------------------------------------------------- the step


class Trainer:
    """The compiled functions of a training. Call them under its mesh (`jax.set_mesh`). A batch has
    a multiple of `batch_shards(mesh)` rows."""

    def __init__(self, loss: LossFunction, optimization: Optimization, total_steps: int, params):
        """params: shapes with shardings, e.g. of `decoder.abstract`."""
        tx = optimizer(optimization, total_steps)
        self.params, self.mesh = params, _mesh(params)
        self.schedule = learning_rate(optimization, total_steps)
        self.optimizer_state = optimizer_state(tx, params)
        whole = replicated(self.mesh)
        of_params, of_state = (
            jax.tree.map(lambda x: x.sharding, tree) for tree in (params, self.optimizer_state)
        )

        @partial(jax.jit, donate_argnames="gradients", out_shardings=(of_params, whole))
        def accumulate(params, gradients, batch, examples):
            """(gradients + ∂(Σ weights·loss / examples), values [e]). gradients is None for the
            first micro-batch; `examples` counts the examples of the whole step."""

            def summed(params):
                loss_e, values = loss(params, batch)
                return jnp.sum(batch["weights"] * loss_e) / examples, values

            new, values = jax.grad(summed, has_aux=True)(params)
            return new if gradients is None else jax.tree.map(jnp.add, gradients, new), values

        @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(of_params, of_state, whole))
        def apply(params, state, gradients, norm):
            """Clip the gradients, whose global norm is `norm`, and update: (params, optimizer
            state, share of the weights whose bfloat16 rounding has changed)."""
            scale = jnp.minimum(1.0, optimization.max_grad_norm / (norm + 1e-6))  # as torch does
            clipped = jax.tree.map(lambda g: g * scale, gradients)
            updates, state = tx.update(clipped, state, params)
            new = optax.apply_updates(params, updates)
            before, after = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, new))
            changed = jax.tree.leaves(jax.tree.map(jnp.not_equal, before, after))
            total = float(sum(x.size for x in changed))  # too many for an int32
            return new, state, sum(jnp.sum(x, dtype=jnp.float32) for x in changed) / total

        self.accumulate, self.apply = accumulate, apply
        self.norm = jax.jit(optax.tree.norm, out_shardings=whole)
        self.init_optimizer = jax.jit(tx.init, out_shardings=of_state)

    def gradients(self, params, batches: list[MicroBatch]):
        """(gradients, their norm, values) of a step. values: {name: fp32 [e]}, in the order of the
        micro-batches."""
        examples = float(sum(len(micro.prompt_ids) for micro in batches))
        gradients, values = None, []
        for micro in batches:
            batch = put_batch(self.mesh, micro.packed) | micro.sides
            gradients, more = self.accumulate(params, gradients, batch, examples)
            more = jax.device_get(more)
            values.append({name: x[: len(micro.prompt_ids)] for name, x in more.items()})
        joined = {name: np.concatenate([each[name] for each in values]) for name in values[0]}
        return gradients, self.norm(gradients), joined


# ----------------------------------------------------------------------- without gradients


def for_each(
    compute: Callable[[dict], tuple],
    mesh,
    batcher: Batcher,
    examples: list,
    title: str,
    check_stop: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """What `compute(batch)` gives for each example, fp32 [examples, 2]: `compute` gives a pair of
    arrays, each with one value per example of a micro-batch. `title` names the progress bar;
    `check_stop` is called before each micro-batch and may raise."""
    from tqdm import tqdm  # here: a bare image, where scripts.bench measures, has none

    values = np.zeros((len(examples), 2), np.float32)
    cut = batcher.cut(examples, range(len(examples)))
    packed = ahead(lambda indices: (indices, batcher.pack(examples, indices)), cut)
    silent = jax.process_index() > 0
    bar = tqdm(packed, desc=title, unit=" batches", total=len(cut), disable=silent)
    for (indices, batch), _ in bar:
        check_stop()
        for column, x in enumerate(jax.device_get(compute(put_batch(mesh, batch)))):
            values[indices, column] = x[: len(indices)]
    return values


def speed(params, batches: list[MicroBatch], seconds: float) -> dict[str, float]:
    """The metrics of a step's speed and memory. Operations count products with weights only,
    forward and backward, and nothing that is computed twice. params: a decoder's shapes, with
    shardings."""
    mesh = _mesh(params)
    tokens = sum(np.sum(micro.packed["copies"][..., 0] >= 0) for micro in batches)
    responses = sum(np.sum(micro.packed["owners"] >= 0) for micro in batches)
    slots = sum(micro.packed["tokens"].size for micro in batches)
    layers = sum(math.prod(x.shape) for x in jax.tree.leaves(params["layers"]))
    flops = 6.0 * (tokens * layers + responses * math.prod(params["embed"].shape))
    metrics = {
        "padding": 1 - tokens / slots,
        "tokens_per_second": tokens / seconds,
        "model_flops_per_second": flops / seconds,
        "peak_memory_gb": peak_memory(mesh) / 1e9,
    }
    if chip := chips.of_kind(mesh.devices.flat[0].device_kind):
        metrics["mfu"] = flops / seconds / (chip.bf16 * mesh.size)
    return {name: float(value) for name, value in metrics.items()}


def peak_memory(mesh) -> int:
    """The most bytes that one device of this process ever held; on CPU, the process."""
    if mesh.devices.flat[0].platform == "cpu":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(d.memory_stats()["peak_bytes_in_use"] for d in mesh.local_devices)
