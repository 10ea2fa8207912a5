"""The stages one after the other: what each hands on to the next, and the caller's mistakes."""

import pytest

from model import checkpoint
from stages.files.output import read_manifest
from tests import tiny
from tests.stages.chain import refused, run_dpo, run_rank, run_sample


def test_every_stage_hands_on_the_rows_their_tokens_and_their_lineage(base):
    samples, ranked = (tiny.read_jsonl(base / f"{n}.jsonl") for n in ("samples", "ranked"))
    assert [r["prompt"] for r in samples] == [p["prompt"] for p in tiny.PROMPTS]
    assert all(len(r["responses"]) == 3 and len(r["scores"]) == 3 for r in ranked)
    made = tiny.read_jsonl(base / "pairs.jsonl")
    by_id = {r["prompt_id"]: r for r in ranked}
    for pair in made:
        row = by_id[pair["prompt_id"]]
        chosen = row["responses"][pair["chosen_index"]]
        assert pair["chosen_token_ids"] == chosen["token_ids"]
        assert pair["chosen_logprob"] == chosen["logprob"]
        assert pair["all_rm_scores"] == row["scores"]
        assert row["scores"][pair["chosen_index"]] == max(row["scores"])
    identity = checkpoint.identity(str(base / "model"))
    lineage = read_manifest(str(base / "pairs.jsonl"))
    assert lineage.identities["model"] == identity and "ranker" in lineage.identities


def test_an_output_from_other_arguments_is_refused_and_kept(base, tmp_path, capsys):
    before = (base / "samples.jsonl").read_bytes()
    refused(capsys, run_sample(base, "--temperature", "0.5"), "temperature", "--overwrite")
    assert run_sample(base) == 0
    assert (base / "samples.jsonl").read_bytes() == before
    assert run_dpo(base, tmp_path / "out") == 0
    refused(capsys, run_dpo(base, tmp_path / "out", "--beta", "0.2"), "beta", "another --out")


@pytest.mark.parametrize(
    "body,word",
    [
        ("raise KeyError('x')", "KeyError"),
        ("return [1.0]", "1 scores for 3 responses"),
        ("return [float('nan')] * len(responses)", "not finite"),
        ("return None", "not a list of numbers"),
    ],
)
def test_a_reward_that_fails_names_the_prompt_and_keeps_what_was_ranked(
    base, tmp_path, capsys, body, word
):
    third = tiny.PROMPTS[2]["prompt"]
    source = f"def f(prompt, responses):\n    if prompt == {third!r}:\n        {body}\n"
    (tmp_path / "r.py").write_text(f"{source}    return [0.0, 1.0, 2.0]\n")
    code = run_rank(base, ranker=f"{tmp_path / 'r.py'}:f", out=tmp_path / "ranked.jsonl")
    prompt_id = tiny.read_jsonl(base / "samples.jsonl")[2]["prompt_id"]
    refused(capsys, code, prompt_id, word)
    kept = tiny.read_jsonl(f"{tmp_path / 'ranked.jsonl'}.partial")
    assert len(kept) == 2 and not (tmp_path / "ranked.jsonl").exists()


def test_a_ranker_that_cannot_be_opened_is_refused(base, tmp_path, capsys):
    (tmp_path / "r.py").write_text("import nothing_of_that_name")
    for ranker, word in (
        (f"{tmp_path / 'none.py'}:f", "does not exist"),
        (f"{tmp_path / 'r.py'}:f", "nothing_of_that_name"),
        (f"{base / 'reward.py'}:missing", "no function 'missing'"),
        ("llm-blender/PairRM", "PairRM"),
    ):
        refused(capsys, run_rank(base, ranker=ranker, out=tmp_path / "x.jsonl"), word)


def test_a_reward_gets_finish_reasons_where_it_asks_and_its_terms_are_recorded(base, tmp_path):
    (tmp_path / "r.py").write_text(
        "def f(prompt, responses, finish_reasons):\n"
        "    return [float(r == 'stop') for r in finish_reasons]\n"
        "f.terms = lambda prompt, response, finish_reason: {'words': len(response.split())}\n"
    )
    code = run_rank(base, ranker=f"{tmp_path / 'r.py'}:f", out=tmp_path / "ranked.jsonl")
    assert code == 0
    for row in tiny.read_jsonl(tmp_path / "ranked.jsonl"):
        stops = [float(r["finish_reason"] == "stop") for r in row["responses"]]
        assert row["scores"] == stops
        words = [{"words": len(r["text"].split())} for r in row["responses"]]
        assert row["score_terms"] == words
