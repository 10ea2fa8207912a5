"""Damaged recipes: each is read as it is, and gives the stages' flags back, or is refused in one
line. FUZZ_CASES says how many (tests/fuzzing.py)."""

import json
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts import recipe as recipes
from stages import dpo, pairs, rank, sample
from tests.fuzzing import cases, changed, damaged
from tests.scripts.test_recipe import parsed
from tests.stages.test_fuzz import ends

RECIPE = {
    "model": "gguf:m.gguf",
    "ranker": "reward.py:reward",
    "iterations": 2,
    "prompts": {"file": "prompts.jsonl", "first": 0, "last": 9},
    "heldout": {"dataset": "a/b", "split": "test"},
    "export_dtype": "bfloat16",
    "sample": {"n": 4, "temperature": 0.5, "stop_strings": ["User:"], "mesh": [1, -1, 1]},
    "rank": {},
    "pairs": {"test_count": 3, "seed": 2},
    "dpo": {"beta": 0.2, "learning_rate": 1e-6, "loss": "ipo", "shardings": True},
    "evaluate": {"sample": {"top_p": 0.8}, "kl": {"prompts": 3, "batch_size": 2}},
    "variant": {"v": {"dpo": {"epochs": 2}, "heldout": "prompts.jsonl"}},
    "machine": {"m": {"sample": {"slots": 8}, "plan": "h100:8", "environment": {"X": "1"}}},
    "from_environment": {"BETA": "dpo.beta", "MINE": "model"},
}
KEYS = ("n", "beta", "file", "seed", "top_k", "max_length", "remat", "cache_memory", "refuse")


def toml(value) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(k)} = {toml(x)}' for k, x in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


@st.composite
def texts(draw) -> bytes:
    content = draw(changed(RECIPE, KEYS))
    if not isinstance(content, dict):
        content = {"model": content}
    lines = (f"{json.dumps(key)} = {toml(value)}\n" for key, value in content.items())
    data = "".join(lines).encode("utf-8", "surrogatepass")
    return draw(damaged(data)) if draw(st.integers(0, 3)) == 0 else data


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("recipes")
    (place / "prompts.jsonl").write_text("{}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield place


@cases(60)
@given(
    data=texts(),
    machine=st.sampled_from(["", "", "m"]),
    variant=st.sampled_from(["", "", "v", "v,v"]),
    beta=st.sampled_from(["", "", "3", "-1", "x", "1e5"]),
)
def test_fuzz_recipes(place, data, machine, variant, beta):
    (place / "own.toml").write_bytes(data)
    made = []

    def read():
        environ = {"VARIANT": variant, "BETA": beta}
        made.append(recipes.read("own.toml", machine, environ))
        recipes.check_values(made[0])

    if not ends(read):
        return
    recipe = made[0]
    json.dumps(recipes.settings_of(recipe, 0, 0), allow_nan=False)
    for table, stage in (
        (recipe.sample, sample.Args),
        (recipe.evaluate["sample"], sample.Args),
        (recipe.rank, rank.Args),
        (recipe.pairs, pairs.Args),
        (recipe.dpo, dpo.Args),
    ):
        words = shlex.split(shlex.join(recipes.flags(table)))
        args = parsed(stage, words)
        read_back = {key: getattr(args, key) for key in table}
        assert {k: list(x) if isinstance(x, tuple) else x for k, x in read_back.items()} == table
        others = (field for field in vars(args) if field not in table)
        assert all(getattr(args, name) == getattr(parsed(stage, []), name) for name in others)
    for iteration in range(min(recipe.iterations, 3) + 1):
        source, _, first, last = recipe.source(iteration, 5)
        assert first >= 0 and (last is None or last > first) and source
