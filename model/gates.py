"""Checks of a training's own numbers: a run that fails one stops and says so. Runs without JAX."""

import math

import numpy as np

from sharding.errors import UserError

# Mean over the pairs of |sampler − trainer|, in log-prob per token. Above the first, rounding to
# float32 does not explain it, rounding to bfloat16 does; above the second, model, template or text
# are not the same.
WARN_DISAGREEMENT, STOP_DISAGREEMENT = 1e-2, 2e-1


def check_finite(step: int, values: dict, prompt_ids: list[str], norm: float = 0.0) -> None:
    """UserError that names the examples with a value that is not finite, or the gradient's norm.
    values: {name: one value per prompt_id}."""
    finite = np.isfinite(list(values.values())).all(axis=0)
    bad = [prompt_id for prompt_id, ok in zip(prompt_ids, finite) if not ok]
    if bad:
        raise UserError(
            f"step {step + 1}: loss or log-probs are not finite for prompt_id "
            f"{', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}: lower --learning-rate"
        )
    if not math.isfinite(norm):
        raise UserError(f"step {step + 1}: the gradient's norm is {norm}: lower --learning-rate")


def check_parameters(norm: float) -> None:
    """UserError where trained parameters are not finite: no loss is computed with the last ones.
    norm: the root of the sum of their squares."""
    if not math.isfinite(norm):
        raise UserError(
            f"the norm of the trained parameters is {norm}, so they are not saved: lower "
            "--learning-rate"
        )


def check_ln_2(loss: float, dtype: str, beta: float, pairs: int) -> None:
    """DPO's loss is ln 2 where the policy is the reference, whatever the label smoothing.

    In bfloat16 each pair's margin carries a rounding of about 1 of log-prob, half of β times which
    reaches its loss; over `pairs` pairs it averages out.
    """
    allowed = 1e-4 if dtype == "float32" else max(2e-2, 2 * beta / math.sqrt(pairs))
    if abs(loss - math.log(2)) > allowed:
        raise RuntimeError(
            f"the loss at step 0 is {loss:.6f}, not ln 2 = {math.log(2):.6f}, although the "
            "policy is the reference: their log-probs are computed differently"
        )


def check_sampler(
    path: str, examples: list, reference_p2: np.ndarray, dtype: str, sampled_in: set[str]
) -> dict[str, float]:
    """The sampler's log-probs must be the trainer's where both have the same model: UserError where
    they differ by far. Returns the largest difference per token.

    examples: pairs of stages/files/examples.py. reference_p2: the trainer's log-probs of them,
    computed in `dtype`. sampled_in: the sampler's dtypes; empty: not known.
    """
    recorded = [i for i, pair in enumerate(examples) if pair.sampled is not None]
    if not recorded:
        return {}
    sampled = np.array([examples[i].sampled for i in recorded])
    tokens = [[len(examples[i].chosen), len(examples[i].rejected)] for i in recorded]
    per_token = np.abs(reference_p2[recorded] - sampled) / np.array(tokens)
    mean = per_token.mean()
    print(
        f"sampler and trainer agree within {per_token.max():.1e} of log-prob per token "
        f"(mean {mean:.1e})"
    )
    message = f"the sampler's log-probs differ from the trainer's by {mean:.2g} per token"
    if mean > STOP_DISAGREEMENT:
        raise UserError(
            f"{path}: {message}: the *_logprob or *_token_ids fields are not what this model "
            "sampled; sample again, or remove them"
        )
    if mean > WARN_DISAGREEMENT and "bfloat16" not in {dtype, *sampled_in}:
        why = "although both computed in float32" if sampled_in else "(sampled in bfloat16?)"
        print(f"warning: {message} {why}")
    return {"sampler_disagreement": float(per_token.max())}
