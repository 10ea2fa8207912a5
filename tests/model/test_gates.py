"""A training's checks of its own numbers."""

import math

import pytest

from model import gates
from sharding.errors import UserError


def test_values_that_are_not_finite_stop_the_training_and_name_the_pairs():
    values = {"loss": [0.1, float("nan"), 0.2], "logps/chosen": [1.0, 2.0, float("-inf")]}
    with pytest.raises(UserError, match=r"step 5: .* prompt_id b, c: lower"):
        gates.check_finite(4, values, ["a", "b", "c"])
    gates.check_finite(4, {"loss": [0.1, 0.2]}, ["a", "b"])


@pytest.mark.parametrize(
    "off,dtype,pairs,is_allowed",
    [
        (9e-5, "float32", 8, True),
        (2e-4, "float32", 8, False),
        (0.06, "bfloat16", 8, True),  # fewer pairs: less of the rounding averages out
        (0.06, "bfloat16", 64, False),
        (0.019, "bfloat16", 10**6, True),
        (0.021, "bfloat16", 10**6, False),
    ],
)
def test_the_first_loss_may_differ_from_ln_2_by_the_rounding_of_its_pairs(
    off, dtype, pairs, is_allowed
):
    for loss in (math.log(2) + off, math.log(2) - off):
        if is_allowed:
            gates.check_ln_2(loss, dtype, 0.1, pairs)
        else:
            with pytest.raises(RuntimeError, match="not ln 2"):
                gates.check_ln_2(loss, dtype, 0.1, pairs)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_parameters_that_are_not_finite_are_refused(norm):
    gates.check_parameters(1e30)
    with pytest.raises(UserError, match="not saved: lower --learning-rate"):
        gates.check_parameters(norm)
