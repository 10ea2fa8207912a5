"""Whatever `--ranker` names, one way to open it: a reward function as FILE.py:FUNCTION
(functions.py), or a PairRM as its folder or hub id (pairrm.py)."""

from typing import Literal

from model.rankers.comparisons import Aggregation, Comparisons
from model.rankers.functions import FunctionRanker
from model.rankers.pairwise import PairwiseRanker
from sharding.errors import UserError


def open_ranker(
    name: str,
    comparisons: Comparisons = "full",
    aggregation: Aggregation = "max_logits",
    backend: Literal["jax", "llm-blender"] = "jax",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> FunctionRanker | PairwiseRanker:
    """Open the ranker `name`. All other arguments are for PairRM, whose weights are loaded when the
    first comparison is made. Raises UserError."""
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return FunctionRanker(path, function)
    if name.endswith(".py"):
        raise UserError(f"ranker {name} names no function: give FILE.py:FUNCTION")
    try:
        if backend == "llm-blender":
            from model.rankers.blender import BlenderRanker  # here: needs PyTorch

            model = BlenderRanker(name)
        else:
            from model.rankers.pairrm import PairRM  # here: a reward function needs no JAX

            model = PairRM(name, dtype=dtype)
    except UserError as error:
        raise UserError(f"ranker {error}") from error
    return PairwiseRanker(model, comparisons, aggregation)
