"""What every ranker takes and gives: a Request goes in, a Ranking comes out. Without JAX.

A ranker has `identity`, the sha256 of whatever decides its scores; `on_mesh`, whether it computes
on the mesh of all processes, each of which then calls it with the same requests; and

    rank_all(requests, done) -> iterator of (request, ranking)

which takes requests as it needs them and gives each back with its ranking as soon as that is
complete. It calls `done(n)` whenever n comparisons (a pairwise ranker) or n prompts (any other) are
finished; `done` may raise to stop the run.
"""

import dataclasses
from collections.abc import Callable

Done = Callable[[int], None]


@dataclasses.dataclass
class Request:
    """The answers to one prompt, to be ranked. `where` names the row in error messages."""

    where: str
    prompt_id: str
    prompt: str  # the text that a reward function sees
    messages: list[dict]  # the conversation up to the prompt, the prompt included
    responses: list[str]
    finish_reasons: list[str]
    row: dict = dataclasses.field(default_factory=dict)  # the caller's own; no ranker reads it
    # Ranked before a restart, so no ranking is given back. A pairwise ranker still counts its
    # comparisons, so that the others go into the same batches as without the restart.
    is_ranked: bool = False


@dataclasses.dataclass
class Ranking:
    """What a ranker says of the n answers to one prompt."""

    scores: list[float]  # one per response, higher is better
    comparisons: list[list[float | None]] | None = None  # n×n logits, pairwise rankers only
    terms: list[dict[str, float]] | None = None  # the parts of each score, if the ranker tells them
    truncated: dict | None = None  # {"prompt": bool, "responses": [bool]}: which texts were cut
