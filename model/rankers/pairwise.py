"""Rankers that compare answers in pairs (PairRM): which prompts' comparisons are computed together,
and how a conversation becomes the texts of a comparison. Without JAX."""

from collections.abc import Iterable, Iterator

from model.rankers.comparisons import Aggregation, Comparisons, Pair, Strategy, strategy
from model.rankers.ranking import Done, Ranking, Request
from sharding.errors import UserError

# The words, and the spelling, that llm-blender gives PairRM.
CONVERSATION = (
    "Finish the following coversation in each i-th turn by filling in <Response i> with your "
    "response."
)


class PairwiseRanker:
    """PairRM, or llm-blender's: compares answers in pairs, the pairs of many prompts together.

    model: has `identity`, `on_mesh`, `encode(source, candidates)`, `logits(comparisons, done)`, and
    `enough(comparisons)`, which says whether these fill its batches.
    """

    def __init__(self, model, comparisons: Comparisons, aggregation: Aggregation):
        self.model, self.identity, self.on_mesh = model, model.identity, model.on_mesh
        self._comparisons, self._aggregation = comparisons, aggregation

    def rank_all(
        self, requests: Iterable[Request], done: Done
    ) -> Iterator[tuple[Request, Ranking]]:
        """Rankings as they become complete. The order of the prompts changes no ranking."""
        # With `full`, which comparisons share a batch is known: a prompt's are all made at once.
        in_one_round = self._comparisons == "full"
        requests = (r for r in requests if in_one_round or not r.is_ranked)
        active: list[_Active] = []
        while True:
            wanted = [(a.encoded, *pair) for a in active for pair in a.wanted]
            if not self.model.enough(wanted) and (request := next(requests, None)):
                begun = self._begin(request)
                if begun.ranking is None:
                    active.append(begun)
                elif not request.is_ranked:  # nothing to compare
                    yield request, begun.ranking
                continue
            if not active:
                return
            if all(a.request.is_ranked for a in active):
                active = []
                continue
            try:
                logits = iter(self.model.logits(wanted, done))
            except ValueError as error:
                first = active[0].request
                raise UserError(f"{first.where} (or soon after it): {error}") from error
            for a in active:
                a.receive({pair: next(logits) for pair in a.wanted})
                if a.ranking is not None and not a.request.is_ranked:
                    yield a.request, a.ranking
            active = [a for a in active if a.ranking is None]

    def _begin(self, request: Request) -> "_Active":
        source, candidates = as_comparison(request.messages, request.responses)
        plan = strategy(self._comparisons, request.responses, self._aggregation, request.prompt_id)
        try:
            return _Active(request, self.model.encode(source, candidates), plan)
        except ValueError as error:
            raise UserError(f"{request.where}, prompt_id {request.prompt_id!r}: {error}") from error


class _Active:
    """A prompt whose comparisons are being made: `wanted` lists the next ones. `ranking` is set
    when no more are needed."""

    def __init__(self, request: Request, encoded, plan: Strategy):
        self.request, self.encoded, self._plan = request, encoded, plan
        self.ranking: Ranking | None = None
        self.receive(None)

    def receive(self, logits: dict[Pair, float] | None):
        """Take the logits of the wanted comparisons (None at the start) and see what comes next."""
        try:
            self.wanted = self._plan.send(logits)
        except StopIteration as end:
            self.wanted, self.ranking = [], end.value
            self.ranking.truncated = getattr(self.encoded, "truncated", None)


def as_comparison(messages: list[dict], responses: list[str]) -> tuple[str, list[str]]:
    """(source, candidates) of a conversation and the answers to its last turn.

    A single user turn is the source as it is. Earlier turns are laid out as in llm-blender's
    `compare_conversations`: all user turns in the source, all answers in each candidate. A system
    message, for which llm-blender has no layout, stands first, on a line of its own. Raises
    ValueError if user and assistant do not take turns.
    """
    system = [m["content"] for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    if [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError("user and assistant do not take turns")
    if len(turns) == 1:
        return "\n".join([*system, turns[0]["content"]]), list(responses)
    questions = [m["content"] for m in turns[::2]]
    earlier = [m["content"] for m in turns[1::2]]
    source = "\n".join(
        f"USER: {text}\nAssistant: <Response {k}>" for k, text in enumerate(questions, 1)
    )
    candidates = [
        "\n".join(f"<Response {k}>: {text}" for k, text in enumerate([*earlier, answer], 1))
        for answer in responses
    ]
    return "\n".join([*system, CONVERSATION + source]), candidates
