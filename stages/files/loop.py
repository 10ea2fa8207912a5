"""The loop of a training stage: gradients, update, metrics, evaluation, stop and save.

It knows nothing of what is trained: the trainer holds the loss, the micro-batches the examples.
"""

import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from model import gates
from model.batches import MicroBatch, ahead
from model.train import Trainer, speed
from sharding import processes
from sharding.errors import UserError
from stages.files.run import STOPPED_TOGETHER, Stopped
from stages.files.work import Work


def train(
    trainer: Trainer,
    work: Work,
    step: int,
    state: dict,
    batches_of: Callable[[int], list[MicroBatch]],
    metrics: Callable[[int, dict[str, np.ndarray]], dict[str, float]],
    evaluate: Callable[[dict], dict[str, float]],
    check_stop: Callable[[], None],
    *,
    steps_per_epoch: int,
    eval_every: int,
    save_every: int,
) -> dict:
    """Train from `step` to the last step and return the state: {"params", "optimizer"}, donated.

    batches_of(step): the step's micro-batches. metrics(step, values): the step's metrics from the
    values of the loss function, one per example. evaluate(params): further metrics, every
    `eval_every` steps. Where a number is not finite, or a signal says stop, the state is saved
    before the exception leaves.
    """
    total_steps, silent = work.total_steps, not processes.is_first()
    progress = tqdm(total=total_steps, initial=step, unit=" steps", desc="train", disable=silent)
    try:
        for batches, waited in ahead(batches_of, range(step, total_steps)):
            start = time.monotonic() - waited
            gradients, norm, values = trainer.gradients(state["params"], batches)
            ids = [prompt_id for micro in batches for prompt_id in micro.prompt_ids]
            gates.check_finite(step, values, ids, float(norm))
            logged = metrics(step, values) | {
                "grad_norm": float(norm),
                "learning_rate": float(trainer.schedule(step)),
                "epoch": (step + 1) / steps_per_epoch,
            }
            seconds = time.monotonic() - start
            logged |= speed(trainer.params, batches, seconds) | {"host_wait": waited / seconds}
            *new, changed = trainer.apply(state["params"], state["optimizer"], gradients, norm)
            state, step = dict(zip(("params", "optimizer"), new)), step + 1
            del gradients, new
            work.log(step, logged | {"bf16_weights_changed": float(changed)})
            shown = {k: logged[k] for k in ("loss", "rewards/accuracies") if k in logged}
            progress.set_postfix(shown, refresh=False)
            progress.update()
            is_last = step == total_steps
            if eval_every and step % eval_every == 0 and not is_last:
                work.log(step, evaluate(state["params"]))
            processes.all_check(check_stop, STOPPED_TOGETHER)
            if save_every and step % save_every == 0 and not is_last:
                work.save_state(step, state)
    except (UserError, Stopped):  # `state` is whole: the one after `step` steps
        work.save_state(step, state)
        work.finish_saving()
        raise
    finally:
        progress.close()
    work.finish_saving()
    return state
