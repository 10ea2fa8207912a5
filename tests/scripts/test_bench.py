"""scripts/bench: its own side of each comparison, with small models."""

from scripts.bench import dpo, rank, sample
from scripts.bench.machine import Side
from tests import tiny, tiny_pairrm


def asked(worker, *args, questions):
    side = Side(worker, *args)
    try:
        return [side.ask(*question) for question in questions]
    finally:
        side.close()


def test_pairrm_ranks_and_counts_what_it_did(tmp_path):
    folder = tiny_pairrm.write_pairrm(tmp_path / "pairrm")
    group = [("What is rain?", ["Water.", "I do not know.", "It falls."])]
    _, ranked, facts = asked(
        rank.our_worker, str(folder), questions=[("warm", [group]), ("rank", group), ("facts",)]
    )
    seconds, made, ((one, *others),), ((row, *rows),) = ranked
    assert seconds > 0 and made == 6 and len(others) == len(rows) == 2
    assert isinstance(one, float) and len(row) == 3
    assert facts["padded"] >= facts["tokens"] > 6 * 10 and facts["flops"] > 0


def test_sampling_counts_its_tokens_and_accounts_for_a_step(tmp_path):
    tiny.write_checkpoint(tmp_path / "model")
    args = sample.Sample(n=2, max_new_tokens=8, slots=4)
    texts = [row["prompt"] for row in tiny.PROMPTS[:3]]
    (seconds, tokens, parts), account = asked(
        sample.our_worker, str(tmp_path / "model"), args, questions=[("sample", texts), ("step",)]
    )
    assert 6 <= tokens <= 3 * 2 * 8 and 0 < sum(took for took, _ in parts.values()) <= seconds
    assert set(parts) == {"decode steps", "prefill"}
    assert account["slots"] == 4 and 0 < account["step"] < seconds


def test_training_steps_and_its_reference_are_timed(tmp_path):
    tiny.write_checkpoint(tmp_path / "model")
    pair = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [9, 8, 7]}
    facts, reference, (step, gemm) = asked(
        dpo.our_worker,
        str(tmp_path / "model"),
        [pair] * 4,
        dpo.Dpo(pairs=2),
        questions=[("begin",), ("reference", 1), ("step", 1)],
    )
    assert all(logp < 0 for logp in facts["logps"]) and (facts["flops"] > 0).all()
    assert reference > 0 and step > 0 and gemm > 1e9
