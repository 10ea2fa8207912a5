import json
import math
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from scripts.recipes import demo_reward
from scripts.recipes.demo_reward import WEIGHTS, asked_forms, reward, terms

DATA = Path(demo_reward.__file__).parent / "demo"
COUNTS = {"train_1": 64, "train_2": 64, "train_3": 64, "dev": 32, "heldout": 96}
KINDS = {"question", "writing", "code", "maths", "rewriting", "extraction", "roleplay", "advice"}

OPEN = "How does a refrigerator keep food cold?"
OPEN_GOOD = (
    "A refrigerator keeps food cold by moving heat from the inside to the outside. A liquid "
    "flows through thin pipes, turns into a gas and takes up heat from the food on the shelves."
)
TWO = "Why does ice float on water? Answer in two sentences."
TWO_GOOD = (
    "Ice floats because it is less dense than water. Its molecules take up more room when cold."
)
LIST = "List four healthy snacks that I can take to the office."
LIST_GOOD = (
    "1. An apple for the office\n2. A handful of nuts\n3. Carrot sticks, a healthy snack\n"
    "4. Plain yogurt"
)
CODE = "Write a Python function named is_even that tells whether an integer is even."
CODE_GOOD = (
    '```python\ndef is_even(number):\n    """Tell whether an integer is even."""\n'
    "    return number % 2 == 0\n```"
)
SUM = "A farmer has 12 hens. Each hen lays 5 eggs a week. How many eggs does he collect in 3 weeks?"
SUM_GOOD = "12 hens lay 12 * 5 = 60 eggs a week, so in 3 weeks the farmer collects 180 eggs."
FIX = 'Correct the grammar: "She don\'t likes to goes at the beach when it are cold."'
FIX_GOOD = "She doesn't like to go to the beach when it is cold."
GOOD = [
    (OPEN, OPEN_GOOD),
    (TWO, TWO_GOOD),
    (LIST, LIST_GOOD),
    (CODE, CODE_GOOD),
    (SUM, SUM_GOOD),
    (FIX, FIX_GOOD),
]


def score(prompt, response, finish_reason="stop"):
    return reward(prompt, [response], [finish_reason])[0]


def read(name):
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def form(prompt, response):
    return terms(prompt, response)["form"]


# --- the whole reward ---


def test_weights_sum_to_one():
    assert math.isclose(sum(WEIGHTS.values()), 1.0)


def test_reward_is_the_weighted_sum_of_its_terms():
    parts = reward.terms(OPEN, OPEN_GOOD, "length")
    assert set(parts) == set(WEIGHTS)
    total = sum(WEIGHTS[name] * value for name, value in parts.items())
    assert math.isclose(score(OPEN, OPEN_GOOD, "length"), total)


@pytest.mark.parametrize("prompt, good", GOOD)
def test_a_sound_plain_answer_scores_high(prompt, good):
    assert score(prompt, good) > 0.9


@pytest.mark.parametrize("prompt, good", GOOD)
@pytest.mark.parametrize(
    "bad",
    [
        "I am always here to help you with anything you need, and I will do my best for you.",
        "It depends.",
        "Yes.",
        "I'm sorry, but as an AI language model I cannot help with that request today.",
    ],
)
def test_a_stock_phrase_loses_clearly(prompt, good, bad):
    assert score(prompt, bad) < score(prompt, good) - 0.2


@pytest.mark.parametrize("prompt, good", GOOD)
def test_a_copied_prompt_loses_clearly(prompt, good):
    assert score(prompt, prompt) < 0.3
    assert score(prompt, f"{prompt} {prompt}") < 0.3


@pytest.mark.parametrize("prompt, good", GOOD)
def test_a_cut_off_answer_loses(prompt, good):
    assert score(prompt, good[: len(good) * 3 // 4], "length") < score(prompt, good) - 0.15


def test_keyword_stuffing_loses_clearly():
    stuffed = (
        "Refrigerator, food, cold, keep, refrigerators, foods, colder, keeping, fridge food cold."
    )
    assert score(OPEN, stuffed) < score(OPEN, OPEN_GOOD) - 0.2


def test_a_repetitive_answer_loses():
    assert score(OPEN, "The refrigerator keeps food cold. " * 8) < score(OPEN, OPEN_GOOD) - 0.08
    assert terms(OPEN, "The refrigerator keeps food cold. " * 8)["fresh"] < 0.1
    assert terms(OPEN, "ha" * 60 + " the food is cold" * 2)["fresh"] < 0.2


def test_an_off_subject_answer_loses():
    other = (
        "Whales are large animals that live in the ocean. They breathe air through a hole on the "
        "top of the head and can dive for more than one hour before they come up."
    )
    assert score(OPEN, other) < score(OPEN, OPEN_GOOD) - 0.2


def test_a_wrong_form_loses():
    assert (
        score(TWO, TWO_GOOD + " It is light. It is hard. It is cold.") < score(TWO, TWO_GOOD) - 0.2
    )
    assert (
        score(CODE, "An integer is even when it can be divided by two.")
        < score(CODE, CODE_GOOD) - 0.2
    )


def test_a_padded_answer_loses():
    for padded in (
        f"Sure! {OPEN_GOOD}",
        f"{OPEN_GOOD} I hope this helps!",
        f"Here is the answer to your question: {OPEN_GOOD}",
        f"{OPEN} {OPEN_GOOD}",
    ):
        assert score(OPEN, padded) < score(OPEN, OPEN_GOOD)


def test_run_away_length_loses_where_something_short_was_asked():
    long = " ".join(f"Ice and water differ in way number {i} of many others." for i in range(20))
    assert terms(TWO, long)["not_padded"] < 0.5


def test_a_too_short_answer_loses():
    assert score(OPEN, "It moves heat outside.") < 0.5


def test_a_short_answer_is_enough_where_it_was_asked_for():
    assert score("What is 15% of 80? Reply with only the number.", "12") == pytest.approx(1.0)


def test_numbers_of_a_sum_count_as_its_subject():
    assert terms(SUM, "It is 12 times 5 times 3, which makes 180.")["on_subject"] > 0.4


def test_an_answer_that_ended_by_itself_beats_the_same_one_cut_off():
    finished = [
        terms(OPEN, OPEN_GOOD, reason)["finished"] for reason in ("stop", "stop_string", "length")
    ]
    assert finished == sorted(finished, reverse=True) and len(set(finished)) == 3
    assert terms(OPEN, OPEN_GOOD.rstrip("."))["finished"] < 1


# --- forms ---

JSON = "Invent a hero as a JSON object with the keys name, power and weakness."
FORMS = [  # prompt, an answer that has the form, answers that have it less and less
    (TWO, TWO_GOOD, [TWO_GOOD + " It is light.", "Ice and water and so on. " * 5]),
    (
        "Can sound travel through empty space? Answer yes or no, then explain in one sentence.",
        "No. Sound needs a medium such as air to travel.",
        ["Sound needs a medium such as air."],
    ),
    (
        "Is 91 prime? Answer yes or no, then show why.",
        "No, because 91 is 7 times 13.",
        ["The number 91 is 7 times 13."],
    ),
    (
        "How many edges does a cube have? Give just the number.",
        "12",
        ["A cube has 12 edges.", "A cube has a lot of edges and corners."],
    ),
    (
        "Explain tides in no more than 10 words.",
        "The moon pulls the sea towards itself.",
        [
            "The moon pulls the sea towards itself as it goes round us.",
            "The moon pulls the sea towards itself as it goes round us, and then it flows back.",
        ],
    ),
    ("In one word, what is the mood?", "Joy.", ["The mood is joy."]),
    (LIST, LIST_GOOD, [LIST_GOOD + "\n5. Rice cakes", LIST_GOOD + "\n5. Rice\n6. Tea\n7. Figs"]),
    (
        LIST,
        "Here are four:\n\nApples\nNuts\nCarrots\nYogurt",
        ["Apples, nuts, carrots and yogurt."],
    ),
    (
        "How do I sleep better? Give three tips as a numbered list.",
        "Try this:\n1. Read a book.\n2. Dim the light.\n3. Drink no coffee.",
        ["- Read a book.\n- Dim the light.\n- Drink no coffee.", "Read a book and dim the light."],
    ),
    (
        "What should I check? Answer in three bullet points.",
        "- Light\n- Water\n- Soil",
        ["1. Light\n2. Water\n3. Soil", "Check the light, the water and the soil."],
    ),
    (
        "Name the senses as a comma-separated list.",
        "sight, smell, touch",
        ["1. sight\n2. smell\n3. touch", "There are senses."],
    ),
    (
        "Write a haiku about snow.",
        "Snow falls on the roof\nA cat looks out the window\nThe tea is still warm",
        ["Snow falls.\nA cat looks.", "Snow falls on the roof."],
    ),
    (
        "Write a four-line poem about rain.",
        "Rain falls on me\nand on the sea\nand on the road\nthat takes me home",
        ["Rain falls on me\nand on the sea\nand on the road", "Rain falls on me and on the sea."],
    ),
    (
        "Write a limerick about a goat.",
        "a goat in a hat\n" * 5,
        ["a goat in a hat\n" * 4, "a goat in a hat\n" * 2],
    ),
    (
        "Write a rhyming couplet about dishes.",
        "I wash a plate\nalthough it is late",
        ["I wash a plate although it is late"],
    ),
    (CODE, CODE_GOOD, ["def is_even(n):\n    pass", "def is_even(n) return n", "Use modulo."]),
    (
        CODE,
        "Use this:\ndef is_even(n):\n    return n % 2 == 0\nIt divides by two.",
        ["def other(n):\n    return n % 2 == 0"],
    ),
    (
        JSON,
        'This: {"name": "Ada", "power": "maths", "weakness": "tea"}',
        ['{"name": "Ada", "power": "maths"}', '{"name": "Ada", power}', "Her name is Ada."],
    ),
]


@pytest.mark.parametrize("prompt, good, worse", FORMS)
def test_form_asked_is_recognised_and_graded(prompt, good, worse):
    values = [form(prompt, answer) for answer in [good, *worse]]
    assert values[0] == pytest.approx(1.0)
    assert all(a > b for a, b in pairwise(values)), values


def test_one_item_too_many_earns_half():
    assert (
        form("Name three planets that have rings.", "1. Saturn\n2. Uranus\n3. Neptune\n4. Mars")
        == 0.5
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "Combine the two sentences and tell me about bullets.",
        "What does this Python code print?",
        "He gives three apples to Mia. How many are left?",
        "What is the number of planets?",
        "Why do we write words in lines?",
    ],
)
def test_no_form_is_seen_where_none_is_asked(prompt):
    assert asked_forms(prompt) == ()


def test_without_a_form_clean_prose_is_asked():
    assert form(OPEN, OPEN_GOOD) == 1.0
    for flaw in ("\nUser: thanks", "<|im_start|>", "\n```python\nx = 1"):
        assert form(OPEN, OPEN_GOOD + flaw) < 0.6


# --- any input ---

WEIRD = [
    "",
    " \n\t ",
    "!!!",
    "\U0001f600" * 50,
    "日本語の文章です。" * 20,
    "a" * 100_000,
    "word " * 20_000,
    "```",
    "```python\ndef f(:\n",
    "def f(x):\n" + "(" * 3000,
    "def f():\n    return " + "-" * 3000 + "1",
    "{" * 5000,
    '{"a": ' * 3000,
    "[" * 5000,
    "\x00\ud800\u2028",
    "1.\n2.\n3.",
    "- ",
    "\\" * 999,
    "1, " * 30_000,
    "\n" * 50_000 + "x",
    "def f(): return '\x00'",
    "::::",
    "-1",
    "½ ² ③",
]
PROMPTS = [
    *{p for p, *_ in FORMS},
    OPEN,
    SUM,
    "",
    "Hi",
    "\x00",
    "Write in under 0 words a 0-line poem.",
    "a JSON object with the keys , .",
    "日本について一文で説明してください。",
]


@pytest.mark.parametrize("response", WEIRD, ids=range(len(WEIRD)))
def test_any_string_gets_finite_terms_between_zero_and_one(response):
    for prompt in PROMPTS:
        values = terms(prompt, response, "length")
        assert set(values) == set(WEIGHTS)
        assert all(isinstance(v, float) and 0 <= v <= 1 for v in values.values()), values
        assert math.isfinite(score(prompt, response, "an unknown reason"))


@pytest.mark.parametrize("response", ["", "   ", "\n\n", "...", "\U0001f600"])
def test_an_answer_without_words_scores_zero(response):
    assert all(score(prompt, response) == 0.0 for prompt, _ in GOOD)


def test_rewards_keep_the_order_of_the_answers():
    both = reward(OPEN, [OPEN_GOOD, "Yes."], ["stop", "stop"])
    assert both == [score(OPEN, OPEN_GOOD), score(OPEN, "Yes.")]
    assert reward(OPEN, [], []) == []


def test_it_is_fast():
    start = time.process_time()
    for _ in range(20):
        for prompt, good in GOOD:
            terms(prompt, good)
    assert (time.process_time() - start) / (20 * len(GOOD)) < 0.005


# --- the prompts ---


@pytest.mark.parametrize("name", COUNTS)
def test_each_file_has_its_count_and_all_kinds_evenly(name):
    rows = read(name)
    assert len(rows) == COUNTS[name]
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(KINDS, COUNTS[name] // len(KINDS))
    assert all(set(row) == {"prompt", "kind"} for row in rows)


def test_all_prompts_are_distinct_and_short():
    prompts = [row["prompt"] for name in COUNTS for row in read(name)]
    assert (
        len({" ".join(p.lower().split()) for p in prompts}) == len(prompts) == sum(COUNTS.values())
    )
    assert all(p == p.strip() and 3 < len(p.split()) <= 100 for p in prompts)


def test_the_share_of_prompts_with_a_form_is_the_same_in_every_file():
    for name in COUNTS:
        rows = read(name)
        share = sum(bool(asked_forms(row["prompt"])) for row in rows) / len(rows)
        assert share == pytest.approx(0.45, abs=0.02)
