"""Reward functions: what a user's file may hold, and what of it is the user's mistake."""

import sys

import pytest

from model.rankers.opening import open_ranker
from sharding.errors import UserError


def rank(path, responses=("a", "bb"), name="reward"):
    ranker = open_ranker(f"{path}:{name}")
    return ranker.rank("prompt", list(responses), ["stop"] * len(responses)).scores


def test_a_dataclass_with_postponed_annotations_may_stand_in_the_file(tmp_path):
    (tmp_path / "reward.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses, typing\n"
        "@dataclasses.dataclass\n"
        "class Weights:\n"
        "    shared: typing.ClassVar[int] = 3\n"
        "    length: float = 2.0\n"
        "def reward(prompt, responses):\n"
        "    return [Weights().length * len(r) for r in responses]\n"
    )
    assert rank(tmp_path / "reward.py") == [2.0, 4.0]


def test_the_file_may_import_a_module_beside_it(tmp_path, monkeypatch):
    (tmp_path / "helper_of_a_reward.py").write_text("def score(text): return -len(text)\n")
    (tmp_path / "reward.py").write_text(
        "import helper_of_a_reward\n"
        "def reward(prompt, responses):\n"
        "    return [helper_of_a_reward.score(r) for r in responses]\n"
    )
    path = list(sys.path)
    assert rank(tmp_path / "reward.py") == [-1.0, -2.0]
    assert sys.path == path
    del sys.modules["helper_of_a_reward"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("import sys\nsys.exit(3)\n", r"does not import \(SystemExit\(3\)\)"),
        ("def reward(p, r): raise SystemExit\n", r"raised SystemExit\(\)"),
        ("def reward(p, r): return '12'\n", "returned '12', not a list of numbers"),
        ("def reward(p, r): return [1.0]\n", "returned 1 scores for 2 responses"),
        ("def reward(p, r): return [1.0, float('nan')]\n", "a score that is not finite"),
    ],
)
def test_what_is_the_user_s_mistake_is_one_line(tmp_path, text, message):
    (tmp_path / "reward.py").write_text(text)
    with pytest.raises(UserError, match=message):
        rank(tmp_path / "reward.py")
