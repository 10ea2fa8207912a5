"""Rows as they are read: checked, keyed, merged; pairs as one conversation and two answers."""

import shutil

import pytest

from model import checkpoint
from model.tokenizer import ChatTokenizer
from sharding.errors import UserError
from stages.files import rows
from stages.files.examples import read_pairs
from stages.files.output import manifest_path
from stages.files.paths import text_sha256
from stages.files.rows import prompt_key
from tests import tiny
from tests.stages.test_output import jsonl


def test_prompt_ids_come_from_the_prompt_alone():
    ids = []
    for prompts in ([{"prompt": "a"}, {"prompt": "b", "x": 1}], [{"prompt": "b"}]):
        ids.append([text_sha256(prompt_key(row, "")) for row in prompts])
    assert ids[0][1] == ids[1][0] != ids[0][0]
    turn = {"role": "user", "content": "b", "name": "ignored"}
    assert prompt_key({"messages": [turn]}, "") == '[{"content":"b","role":"user"}]'


def test_a_byte_order_mark_and_blank_lines_and_a_missing_last_newline_are_fine(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert [row["a"] for _, row in rows.json_rows(str(path))] == [1, 2]


def test_rows_that_disagree_beyond_the_prompt_are_not_merged(tmp_path):
    answered = {"prompt": "x", "responses": [{"text": "a"}, {"text": "b"}]}
    lines = [answered | {"scores": [1, 2]}, answered | {"scores": [1, 2]}]
    path = jsonl(tmp_path / "x.jsonl", *lines)
    ranked = rows.read(str(path), rows.Ranked)
    assert len(list(ranked)) == len(ranked) == 1
    assert ranked.counts["merged: the same prompt again"] == 1
    jsonl(path, *lines, answered | {"scores": [2, 1]})
    with pytest.raises(UserError, match=r"line 3: .* another prompt or .*other scores"):
        rows.read(str(path), rows.Ranked)


def talk(*texts: str, system: str | None = None) -> list[dict]:
    turns = [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 9, texts)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "conversation"),
    [
        ("hi", talk("hi", "a"), talk("hi", "b"), talk("hi")),
        ("hi", talk("hi", "a")[1:], talk("hi", "b")[1:], talk("hi")),  # the answers alone
        ("q2", talk("q1", "a1", "q2", "a"), talk("q1", "a1", "q2", "b"), talk("q1", "a1", "q2")),
        ("q1", talk("q1", "a1", "q2", "a"), talk("q1", "a1", "q2", "b"), talk("q1", "a1", "q2")),
        ("hi", talk("hi", "a", system="s"), talk("hi", "b", system="s"), talk("hi", system="s")),
    ],
)
def test_both_answers_of_a_pair_end_one_conversation(prompt, chosen, rejected, conversation):
    pair = rows.Pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}, "here")
    assert pair.unusable is None and pair.messages == conversation
    assert (pair.chosen.text, pair.rejected.text) == ("a", "b")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rejected": talk("other", "b")}, "different conversations"),
        ({"rejected": talk("hi", "b", system="s")}, "different conversations"),
        ({"rejected": talk("hi", "x", "more", "b")}, "different conversations"),
        ({"prompt": "what?"}, "another conversation than the row's prompt"),
        ({"messages": talk("what?")}, "another conversation than the row's prompt"),
        ({"messages": talk("q", "a", "hi")}, "another conversation than the row's prompt"),
    ],
)
def test_a_pair_of_two_conversations_is_unusable(fields, reason):
    row = {"prompt": "hi", "chosen": talk("hi", "a"), "rejected": talk("hi", "b")} | fields
    assert reason in rows.Pair(row, "here").unusable


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (talk("hi"), "'chosen' must end with the assistant's answer"),
        ([], "'chosen' must end with the assistant's answer"),
        (talk("hi", "a", "more"), "'chosen' must end with the assistant's answer"),
        ("a", "field 'chosen' is str, not list"),
        ([*talk("hi"), {"role": "assistant", "content": None}], "'content' is NoneType"),
        ([*talk("hi"), {"role": "tool", "content": "x"}], "role 'tool' is not"),
        ([*talk("hi"), {"role": "assistant", "content": "", "tool_calls": [{}]}], "tool_calls"),
    ],
)
def test_a_malformed_side_of_a_pair_is_named(chosen, message):
    with pytest.raises(UserError, match=f"^here.*{message}"):
        rows.Pair({"prompt": "hi", "chosen": chosen, "rejected": talk("hi", "b")}, "here")


@pytest.mark.parametrize("logprob", [-(10**400), -1e200])
def test_a_log_prob_that_no_sum_holds_is_named(logprob):
    row = {"prompt": "hi", "responses": [{"text": "a", "logprob": logprob}]}
    with pytest.raises(
        UserError, match=r"^here, responses\[0\]: field 'logprob' is beyond 1e\+100"
    ):
        rows.Sample(row, "here")


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "one"}, {"prompt": "two"})
    prompts = rows.read(str(path), rows.Prompt)
    first = prompts.ids[0]
    jsonl(path, {"prompt": "six"}, {"prompt": "two"})
    with pytest.raises(UserError, match="has changed while it was read"):
        prompts[first]


def test_a_file_that_changes_while_it_is_read_for_the_first_time_is_named(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "one"}, {"prompt": "two"})
    prompts = rows.read(
        str(path), rows.Prompt, lambda row: jsonl(path, {"prompt": "six"}, {"prompt": "two!"})
    )
    with pytest.raises(UserError, match="has changed while it was read"):
        list(prompts)


def test_the_turn_that_is_answered_is_what_a_reward_function_sees():
    row = rows.Prompt({"prompt": "first", "messages": talk("first", "a", "second")}, "here")
    assert row.prompt == "second"


def test_pairs_of_other_token_ids_are_not_merged(tmp_path):
    pair = {
        "prompt_id": "x",
        "prompt": "hi",
        "chosen": talk("hi", "a"),
        "rejected": talk("hi", "b"),
    }
    path = jsonl(tmp_path / "p.jsonl", pair, pair | {"chosen_token_ids": [5]})
    with pytest.raises(UserError, match="or other chosen_token_ids"):
        rows.read(str(path), rows.Pair)


def test_a_pair_of_an_empty_prompt_is_unusable():
    row = {"prompt": " ", "chosen": talk(" ", "a"), "rejected": talk(" ", "b")}
    assert rows.Pair(row, "here").unusable == "the prompt is empty"


TALK = talk("Translate it.", "Which?", "To French.", system="Be brief.")
ASKED_APART = [  # a row's fields, and the one that would be left out of what is asked
    ({"prompt": "Translate.", "input": "Good morning"}, "input"),
    ({"prompt": "Sum it up.", "context": "A text."}, "context"),
    ({"prompt": "Who is it?", "passage": "A text."}, "passage"),
    ({"prompt": "Why?", "documents": [{"title": "t", "text": "A text."}]}, "documents"),
    ({"prompt": "And then?", "history": [["Once?", "Yes."]]}, "history"),
    ({"prompt": "What is it?", "image": {"path": "cat.png"}}, "image"),
    ({"prompt": "What are they?", "images": ["cat.png"]}, "images"),
    ({"prompt": "Hi", "system": "You are a pirate."}, "system"),
    ({"prompt": "Hi", "system_prompt": "You are a pirate."}, "system_prompt"),
    ({"messages": TALK, "system_message": "You are a pirate."}, "system_message"),
    ({"messages": TALK, "system": "You are a pirate."}, "system"),
    ({"messages": TALK, "tools": [{"name": "search"}]}, "tools"),
    ({"messages": talk("Hi"), "functions": "[search]"}, "functions"),
    ({"prompt": "Add 2 to it.", "input": 5}, "input"),
]
NOT_APART = [
    {"prompt": "Hi", "system": None, "input": " ", "tools": [], "history": {}, "context": ""},
    {"prompt": "Translate: Good morning", "instruction": "Translate", "input": "Good morning"},
    {"messages": TALK, "system": "Be brief."},
    {"prompt": "Hi", "topic": "greetings", "system_fingerprint": "x"},
]


@pytest.mark.parametrize(("row", "name"), ASKED_APART)
def test_what_is_asked_apart_from_the_prompt_is_refused_in_every_stage(tmp_path, row, name):
    sides = {side: talk("", side)[1:] for side in ("chosen", "rejected")}
    answers = {"responses": [{"text": "a"}], "scores": [1]}
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "first"} | sides | answers, row | sides | answers)
    for kind in (rows.Prompt, rows.Sample, rows.Ranked, rows.Pair):
        with pytest.raises(UserError, match=f"line 2: field '{name}' is part of the task"):
            rows.read(str(path), kind)


@pytest.mark.parametrize("row", NOT_APART)
def test_what_stands_in_the_prompt_too_is_no_obstacle(tmp_path, row):
    path = jsonl(tmp_path / "x.jsonl", row)
    assert rows.read(str(path), rows.Prompt).counts == {"in": 1}
    pair = {"chosen": [*TALK, talk("", "a")[1]], "rejected": [*TALK, talk("", "b")[1]]}
    path = jsonl(tmp_path / "x.jsonl", {"prompt": "To French.", "system": "Be brief."} | pair)
    assert rows.read(str(path), rows.Pair).counts == {"in": 1}


# ---------------------------------------------------------------------- texts and their token ids


@pytest.fixture
def edited(base, tmp_path):
    """What reads base's pairs with their second row changed by `change`, a manifest beside them."""
    config, tokenizer = checkpoint.open_folder(str(base / "model"))

    def read(change, manifest=True):
        lines = tiny.read_jsonl(base / "pairs.jsonl")
        lines[1] = change(lines[1])
        path = tiny.write_jsonl(tmp_path / "pairs.jsonl", lines)
        if manifest:
            shutil.copy(manifest_path(str(base / "pairs.jsonl")), manifest_path(path))
        return read_pairs(path, tokenizer, config.vocab_size, 1024, 512, [])[0]

    return read


def answered(row: dict, side: str, change) -> dict:
    """The row with another text as this answer."""
    *before, answer = row[side]
    return row | {side: [*before, answer | {"content": change(answer["content"])}]}


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: "Another answer.",
        lambda text: "",
        lambda text: text + ".",
        lambda text: text[:-1],
        lambda text: text[1:],
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text[:3] + "é" + text[3:],
        lambda text: text[::-1],
        lambda text: text * 2,
    ],
)
def test_an_answer_that_was_edited_but_not_its_token_ids_is_named(edited, side, change):
    with pytest.raises(
        UserError, match=f"line 2: the text of '{side}' .*remove .*{side}_token_ids"
    ):
        edited(lambda row: answered(row, side, change))
    made = [f"{side}_{name}" for name in ("token_ids", "end_token_id", "logprob", "finish_reason")]

    def as_told(row):
        return {k: v for k, v in answered(row, side, lambda _: "Another.").items() if k not in made}

    assert len(edited(as_told)) == len(edited(lambda row: row))


def test_a_prompt_that_was_edited_but_not_its_token_ids_is_named(edited):
    def change(row):
        turn = [{"role": "user", "content": "Another?"}]
        sides = {side: [*turn, row[side][-1]] for side in ("chosen", "rejected")}
        return {k: v for k, v in row.items() if k != "messages"} | {"prompt": "Another?"} | sides

    with pytest.raises(
        UserError, match=r"line 2: the text of 'prompt' .* remove prompt_token_ids$"
    ):
        edited(change)


def test_other_fields_may_be_edited_and_files_of_other_tools_have_texts_of_their_own(edited):
    assert edited(lambda row: answered(row, "chosen", lambda text: text + "."), manifest=False)
    assert edited(lambda row: row | {"topic": "edited", "win_probability": 0.9})
    # Cut by a stop string that began within a token.
    cut = {"chosen_finish_reason": "stop_string"}
    assert edited(lambda row: answered(row, "chosen", lambda text: text + ".") | cut)


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"chosen_token_ids": [70]}, [70, 2]),
        ({"chosen_token_ids": [70, 2]}, [70, 2]),
        ({"chosen_token_ids": [70, 0]}, [70, 0]),
        ({"chosen_token_ids": [70, 2], "chosen_end_token_id": 2}, [70, 2]),
        ({"chosen_token_ids": [70, 0], "chosen_end_token_id": 0}, [70, 0]),
        ({"chosen_token_ids": [70], "chosen_end_token_id": 0}, [70, 0]),
        ({"chosen_token_ids": [70, 2], "chosen_finish_reason": "stop"}, [70, 2]),
        ({"chosen_token_ids": [70, 2], "chosen_finish_reason": "length"}, [70, 2]),
        ({"chosen_token_ids": [70], "chosen_finish_reason": "length"}, [70]),
        ({"chosen_token_ids": [2]}, [2]),
        ({"chosen_token_ids": [70, 2, 71]}, [70, 2, 71, 2]),
    ],
)
def test_an_end_that_the_ids_have_already_is_trained_once(base, tmp_path, fields, ids):
    tokenizer = ChatTokenizer.from_folder(str(base / "model"), (2, 0))
    row = {"prompt": "hi", "chosen": talk("hi", "a"), "rejected": talk("hi", "b")} | fields
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [row])
    (example,), _ = read_pairs(path, tokenizer, tiny.VOCABULARY, 1024, 512, [])
    assert example.chosen.tolist() == ids
