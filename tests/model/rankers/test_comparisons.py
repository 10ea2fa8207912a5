"""Which answers are compared, what the comparisons are made into, and what a run reports."""

import dataclasses

import numpy as np
import pytest

from model.rankers.blender import import_blender
from model.rankers.comparisons import Report, aggregate, strategy
from model.rankers.pairwise import PairwiseRanker, as_comparison
from model.rankers.ranking import Ranking, Request


def run(kind, texts, logit, aggregation="max_logits", prompt_id="p"):
    """(ranking, the comparisons that were asked for) with logit(i, j) as the judge."""
    plan, asked = strategy(kind, texts, aggregation, prompt_id), []
    try:
        wanted = plan.send(None)
        while True:
            asked += wanted
            wanted = plan.send({pair: logit(*pair) for pair in wanted})
    except StopIteration as end:
        return end.value, asked


def random_matrix(n, seed):
    matrix = np.random.default_rng(seed).normal(size=(n, n)).astype(np.float32)
    np.fill_diagonal(matrix, 0)
    return matrix


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
def test_scores_and_ranks_of_a_full_matrix_are_llm_blenders(n):
    import_blender()
    from llm_blender.gpt_eval.utils import get_ranks_from_scores, get_scores_from_cmps

    matrix = random_matrix(n, n)
    ranking, asked = run(
        "full", [f"answer {i}" for i in range(n)], lambda i, j: float(matrix[i, j])
    )
    assert sorted(asked) == [(i, j) for i in range(n) for j in range(n) if i != j]
    np.testing.assert_array_equal(ranking.comparisons, matrix)
    theirs = get_scores_from_cmps(matrix[None])[0]
    np.testing.assert_allclose(ranking.scores, theirs, atol=1e-6)
    ours = get_ranks_from_scores(np.array(ranking.scores))
    np.testing.assert_array_equal(ours, get_ranks_from_scores(theirs))


def test_max_wins_counts_a_win_alike_in_both_orders():
    matrix = np.array([[0, 2.0, 1.0], [3.0, 0, -1.0], [-2.0, 4.0, 0]])
    # 0 wins (0,1), (0,2), (2,0); 1 wins (1,0); 2 wins (1,2), (2,1).
    assert aggregate(matrix, "max_wins") == [3.0, 1.0, 2.0]
    flipped = -matrix.T  # the same winners, each comparison made in the other order
    assert aggregate(flipped, "max_wins") == [3.0, 1.0, 2.0]


def test_equal_answers_are_compared_once_and_score_the_same():
    texts = ["a", "b", "a", "c", "a"]
    matrix = random_matrix(5, 3) + 0.5
    ranking, asked = run("full", texts, lambda i, j: float(matrix[i, j]))
    assert sorted(asked) == [(0, 0), (0, 1), (0, 3), (1, 0), (1, 3), (3, 0), (3, 1)]
    assert ranking.scores[0] == ranking.scores[2] == ranking.scores[4]
    assert ranking.comparisons[2][4] == ranking.comparisons[4][0] == matrix[0, 0]
    assert ranking.comparisons[4][1] == ranking.comparisons[0][1] == matrix[0, 1]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
def test_bubble_finds_the_best_and_the_worst_with_fewer_comparisons(n):
    quality = np.random.default_rng(n).permutation(n)
    for prompt_id in ("a", "b", "c", "d"):
        ranking, asked = run(
            "bubble",
            [f"{i}" for i in range(n)],
            lambda i, j: float(quality[i] - quality[j]),
            prompt_id=prompt_id,
        )
        assert len(asked) == len(set(asked)) <= max(0, 4 * n - 6)
        if n > 1:
            assert np.argmax(ranking.scores) == np.argmax(quality)
            assert np.argmin(ranking.scores) == np.argmin(quality)
        assert sorted(ranking.scores) == sorted([0.0] * n if n < 2 else [1, -1] + [0] * (n - 2))
        known = [
            (i, j)
            for i in range(n)
            for j in range(n)
            if i != j and ranking.comparisons[i][j] is not None
        ]
        assert sorted(known) == sorted(asked)


def test_bubble_meets_in_an_order_that_the_prompt_id_alone_decides():
    texts = [f"{i}" for i in range(8)]
    orders = [run("bubble", texts, lambda i, j: 1.0, prompt_id=p)[1] for p in ("x", "x", "y")]
    assert orders[0] == orders[1] != orders[2]


def test_bubble_of_equal_answers_ties_them():
    ranking, asked = run("bubble", ["same"] * 3, lambda i, j: 1.0)
    assert (ranking.scores, asked) == ([0.0] * 3, [])
    ranking, asked = run("bubble", ["a", "b", "a"], lambda i, j: float(j - i))
    assert ranking.scores == [1.0, -1.0, 1.0]
    assert sorted(asked) == [(0, 1), (1, 0)]


def test_bubble_leaves_blank_answers_out_where_two_have_text():
    ranking, asked = run("bubble", ["", "a", " ", "b"], lambda i, j: float(i - j))
    assert ranking.scores == [0.0, -1.0, 0.0, 1.0]
    assert sorted(asked) == [(1, 3), (3, 1)]
    assert run("bubble", ["", "a"], lambda i, j: float(i - j))[0].scores == [-1.0, 1.0]


def test_the_report_counts_pairs_by_hand():
    report = Report()
    matrix = [[0, 1.0, 2.0], [-1.0, 0, 3.0], [2.0, 1.0, 0]]
    cut = {"prompt": False, "responses": [True, False, False]}
    report.add(["a", "bbb", "cc"], Ranking([3.0, 2.0, 1.0], matrix, truncated=cut))
    report.add(["same", "same"], Ranking([0.0, 0.0], [[0, 1.0], [1.0, 0]]))
    found = report.results()
    # (0,1) is decided alike in both orders; (0,2) ties; (1,2) goes to whoever stands first.
    assert found["pairs"] == 3
    assert found["swap_consistency"] == pytest.approx(1 / 3)
    assert found["tie_rate"] == pytest.approx(1 / 3)
    assert found["truncation_rate"] == pytest.approx(2 / 3)
    expected = np.corrcoef([3, 2, 1], [1, 3, 2])[0, 1]
    assert found["score_length_correlation"] == pytest.approx(expected)


def test_a_conversation_is_laid_out_as_by_llm_blender():
    import_blender()
    from llm_blender.blender.blender_utils import get_pair_from_conv

    turns = ["Hi there", "Hello!", "And now?", "Now we talk.", "Good."]
    roles = ["user", "assistant"]
    messages = [{"role": roles[k % 2], "content": text} for k, text in enumerate(turns)]
    source, candidates = as_comparison(messages, ["First.", "Second one."])

    def conversation(answer):
        return [
            {"role": roles[k % 2].upper(), "content": text}
            for k, text in enumerate([*turns, answer])
        ]

    theirs = get_pair_from_conv([conversation("First.")], [conversation("Second one.")])
    assert ([source], [candidates[0]], [candidates[1]]) == tuple(theirs)


def test_a_single_question_is_the_source_itself_and_broken_turns_are_refused():
    question = [{"role": "user", "content": "Why?"}]
    assert as_comparison(question, ["a", "b"]) == ("Why?", ["a", "b"])
    system = [{"role": "system", "content": "Be brief."}]
    assert as_comparison(system + question, ["a"]) == ("Be brief.\nWhy?", ["a"])
    with pytest.raises(ValueError, match="take turns"):
        as_comparison(question + question, ["a"])


def test_best_finds_the_best_alone_in_an_eighth_of_sixteens_comparisons():
    quality = np.random.default_rng(3).permutation(16)
    ranking, asked = run(
        "best", [f"{i}" for i in range(16)], lambda i, j: float(quality[i] - quality[j])
    )
    assert ranking.scores == [float(q == 15) for q in quality]
    assert len(asked) == 30 and 8 * len(asked) == 16 * 15
    known = sum(x is not None for row in ranking.comparisons for x in row) - 16
    assert known == 30
    # The same answer twice is best twice; one alone is best.
    assert run("best", ["a", "b", "b"], lambda i, j: float(i - j))[0].scores == [0.0, 1.0, 1.0]
    assert run("best", ["a"], None)[0].scores == [1.0]


class Counts:
    """Stands for a PairRM whose batches are full with seven comparisons, and keeps what was
    computed together."""

    identity, on_mesh = "counts", False

    def __init__(self):
        self.computed = []

    def encode(self, source, candidates):
        return source

    def enough(self, comparisons):
        return len(comparisons) >= 7

    def logits(self, comparisons, done):
        self.computed.append([(source, *pair) for source, *pair in comparisons])
        return [float(i - j) for _, i, j in comparisons]


@pytest.mark.parametrize("ranked", [0, 2, 3, 5, 9])
def test_after_a_restart_comparisons_share_a_batch_with_the_same_ones(ranked):
    requests = [
        Request(
            where=f"line {i}",
            prompt_id=str(i),
            prompt=str(i),
            messages=[{"role": "user", "content": str(i)}],
            responses=[f"{i} {j}" for j in range(1 + i % 4)],
            finish_reasons=["stop"] * (1 + i % 4),
            is_ranked=i < ranked,
        )
        for i in range(10)
    ]
    unbroken, again = Counts(), Counts()
    everything = [dataclasses.replace(request, is_ranked=False) for request in requests]
    assert len([*PairwiseRanker(unbroken, "full", "max_logits").rank_all(everything, None)]) == 10
    ours = [*PairwiseRanker(again, "full", "max_logits").rank_all(requests, None)]
    assert {request.prompt_id for request, _ in ours} == {str(i) for i in range(ranked, 10)}
    assert again.computed == unbroken.computed[-len(again.computed) :]
    assert (len(again.computed) < len(unbroken.computed)) == (ranked >= 3)
    # Where the later comparisons depend on the earlier ones, those that are ranked are left out.
    best = PairwiseRanker(Counts(), "best", "max_logits").rank_all(requests, None)
    assert {request.prompt_id for request, _ in best} == {str(i) for i in range(ranked, 10)}
