"""Reward functions: what a user's file may hold, and what of it is the user's mistake."""

import os
import sys

import pytest

from model.rankers.functions import imported_files
from model.rankers.opening import open_ranker
from sharding.errors import UserError

HELPER = "import helper\ndef reward(p, rs): return [helper.score(r) for r in rs]\n"


def write(folder, files: dict[str, str] | str):
    """Python files, name → text; a text alone is reward.py."""
    files = {"reward": files} if isinstance(files, str) else files
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "reward.py"


def opened(path, name="reward"):
    return open_ranker(f"{path}:{name}")


def rank(path, responses=("a", "bb"), name="reward"):
    ranker = opened(path, name)
    return ranker.rank("prompt", list(responses), ["stop"] * len(responses)).scores


# ------------------------------------------------------------------------ what a file may hold


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


@pytest.mark.parametrize(
    "files",
    [
        {"reward": HELPER, "helper": "def score(t): return -len(t)"},
        {
            "reward": "def reward(p, rs):\n import helper\n return [helper.score(r) for r in rs]\n",
            "helper": "def score(t): return -len(t)",
        },
        {
            "reward": HELPER,
            "helper": "from deeper import score",
            "deeper": "score = lambda t: -len(t)",
        },
        {
            "reward": HELPER,
            "helper/__init__": "from .a import score",
            "helper/a": "score = lambda t: -len(t)",
        },
        {
            "reward": HELPER.replace("helper", "helper.a"),
            "helper/a": "score = lambda t: -len(t)",  # a package without __init__.py
        },
        # Names that Python, or this project, has too.
        {
            "reward": HELPER,
            "helper": "import json\nscore = lambda t: -len(json.loads('[1]') * len(t))",
            "json": "1 / 0",
        },
        {
            "reward": "import model\ndef reward(p, rs): return [model.score(r) for r in rs]\n",
            "model": "score = lambda t: -len(t)",
            "numpy/data": "1 / 0",  # a folder of that name does not stand for the library
            "colorsys": "1 / 0",
        },
        {
            "reward": "import numpy, colorsys\nreward = lambda p, rs: -numpy.array([1, 2])",
            "numpy/x": "",
            "colorsys": "1 / 0",
        },
    ],
    ids=["beside", "in a function", "of a helper", "package", "namespace", "json", "model", "data"],
)
def test_the_file_may_import_what_lies_beside_it(tmp_path, files):
    path, known = list(sys.path), dict(sys.modules)
    assert rank(write(tmp_path, files)) == [-1.0, -2.0]
    assert sys.path == path
    assert all(sys.modules[name] is module for name, module in known.items())
    assert not {"helper", "deeper", "helper.a"} & sys.modules.keys()


@pytest.mark.parametrize("name", ["json", "model", "stages", "reward-2", "numpy"])
def test_the_file_may_have_any_name(tmp_path, name, monkeypatch):
    (tmp_path / f"{name}.py").write_text("def reward(p, rs): return [len(r) for r in rs]\n")
    assert rank(tmp_path / f"{name}.py") == [1.0, 2.0]
    monkeypatch.chdir(tmp_path)
    assert rank(f"{name}.py") == rank(f"./{name}.py") == [1.0, 2.0]


def test_two_files_may_each_have_a_helper_of_their_own(tmp_path):
    lazily = "def reward(p, rs):\n import helper\n return [helper.score(r) for r in rs]\n"
    for text in (HELPER, lazily):
        rankers = [
            opened(
                write(
                    tmp_path / sign, {"reward": text, "helper": f"score = lambda t: {sign}len(t)"}
                )
            )
            for sign in "+-"
        ]
        for _ in range(2):
            scores = [ranker.rank("p", ["a"], ["stop"]).scores for ranker in rankers]
            assert scores == [[1.0], [-1.0]]


def test_what_is_imported_is_a_part_of_the_identity(tmp_path):
    text = "def reward(p, rs):\n from a import b, c\n import a.d as e\n return [0] * len(rs)\n"
    files = {"reward": text, "a/__init__": "", "a/b": "from . import f\nfrom ..up import x"}
    files |= {"a/c": "x = (", "a/d": "", "a/f": "", "a/unused": "", "other": "", "up": ""}
    path = write(tmp_path, files)
    imported = {f"a/{name}.py" for name in ("__init__", "b", "c", "d", "f")} | {"up.py"}
    assert {str(p.relative_to(tmp_path)) for p in imported_files(path)} == imported
    (tmp_path / "a/c.py").write_text("")
    (tmp_path / "a/b.py").write_text("")
    before = opened(path).identity
    for file, changes in (("other.py", False), ("a/unused.py", False), ("a/d.py", True)):
        (tmp_path / file).write_text("changed = True\n")
        assert (opened(path).identity != before) == changes


LIB = "import importlib, importlib.util, os, runpy, sys\nhere = os.path.dirname(__file__)\n"
SPEC = """spec = importlib.util.spec_from_file_location("any", here + "/{file}")
h = importlib.util.module_from_spec(spec)
spec.loader.exec_module(h)
"""
ON_PATH = "sys.path.insert(0, here + '/{folder}')\n"
# How a file may come by a module → the module's file, beside it.
LOADED = {
    "h = importlib.import_module('helper')": "helper",
    "h = importlib.import_module('pack.helper')": "pack/helper",
    "h = __import__('helper')": "helper",
    "h = __import__('pack.helper', fromlist=['x'])": "pack/helper",
    ON_PATH.format(folder="lib") + "import rules as h": "lib/rules",
    ON_PATH.format(folder="../shared") + "import rules as h": "../shared/rules",
    ON_PATH.format(folder="../shared") + "import names.rules as h": "../shared/names/rules",
    SPEC.format(file="lib/rules.py"): "lib/rules",
    SPEC.format(file="../rules.py") + "sys.modules['any'] = h": "../rules",
    "import types\nh = types.SimpleNamespace(**runpy.run_path(here + '/lib/x.py'))": "lib/x",
    "class h: exec(open(here + '/lib/x.py').read())": "lib/x",
    "class h: exec('from helper import sign')": "helper",
}


@pytest.mark.parametrize("how", LOADED)
def test_a_module_is_a_part_of_the_identity_however_it_is_loaded(tmp_path, how):
    text = f"{LIB}{how}\ndef reward(p, rs): return [h.sign * len(r) for r in rs]\n"
    path, known, rankers = list(sys.path), set(sys.modules), []
    for folder, sign in (("a", 1), ("b", -1), ("c", -1)):
        files = {"reward": text, LOADED[how]: f"sign = {sign}", "lib/unused": folder}
        rankers.append(opened(write(tmp_path / folder / "own", files)))
    for _ in range(2):
        scores = [ranker.rank("p", ["ab"], ["stop"]).scores for ranker in rankers]
        assert scores == [[2.0], [-2.0], [-2.0]]
    first, other, same = [ranker.identity for ranker in rankers]
    assert first != other and other == same
    assert sys.path == path
    assert all(name.startswith("ranker_") for name in sys.modules.keys() - known)


@pytest.mark.parametrize("how", [how for how in LOADED if "../rules.py" not in how])
def test_a_module_that_is_loaded_too_late_for_the_identity_is_named(tmp_path, how):
    lines = "".join(f" {line}\n" for line in how.splitlines())
    text = f"{LIB}def reward(p, rs):\n{lines} return [h.sign * len(r) for r in rs]\n"
    name = f"own/{LOADED[how]}"
    path = write(tmp_path, {"own/reward": text, name: "sign = 1"}).parent / "own/reward.py"
    os.utime(tmp_path / f"{name}.py", (0, 0))
    with pytest.raises(UserError, match=f"loads .*{LOADED[how].rpartition('/')[2]}.py when it is"):
        rank(path)


@pytest.mark.parametrize("place", ["reward/own.py", "own.py"])
def test_what_the_function_writes_and_runs_is_no_part_of_it(tmp_path, place, monkeypatch):
    """As an answer's code, which its test runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("1 / 0")
    text = f"import runpy\ndef run(r):\n open({place!r}, 'w').write(f'n = len({{r!r}})')\n"
    text += f" return runpy.run_path({place!r})['n']\ndef reward(p, rs): return map(run, rs)\n"
    path = write(tmp_path / "reward", text)
    (ranker := opened(path))._opened -= 1  # file times are coarse
    for _ in range(2):
        assert ranker.rank("p", ["a", "bb"], ["stop"] * 2).scores == [1.0, 2.0]
    assert opened(path).identity == ranker.identity


def test_the_identity_of_a_single_file_is_that_of_its_text_and_the_function():
    """As in earlier versions, whose runs go on."""
    ranker = opened("scripts/recipes/demo_reward.py")
    assert len(ranker.identity) == 64 and not imported_files(ranker._file)


@pytest.mark.parametrize(
    ("returned", "scores"),
    [
        ("[1, 2.5]", [1, 2.5]),
        ("(1, 2)", [1, 2]),
        ("(float(i) for i in range(2))", [0, 1]),
        ("map(len, rs)", [1, 2]),
        ("range(2)", [0, 1]),
        ("[True, False]", [1, 0]),
        ("numpy.array([1, 2])", [1, 2]),
        ("[numpy.float32(0.5), numpy.int64(2)]", [0.5, 2]),
        ("numpy.array([1, 2], numpy.float16)", [1, 2]),
        ("jax.numpy.array([1.0, 2.0])", [1, 2]),
        ("list(jax.numpy.array([1.0, 2.0]))", [1, 2]),
        ("torch.tensor([1.0, 2.0], requires_grad=True)", [1, 2]),
        ("[decimal.Decimal('0.5'), fractions.Fraction(1, 4)]", [0.5, 0.25]),
        ("{'a': 1, 'b': 2}.values()", [1, 2]),
    ],
)
def test_scores_may_be_any_numbers_in_order(tmp_path, returned, scores):
    used = [name for name in ("numpy", "jax", "torch", "decimal", "fractions") if name in returned]
    imports = "".join(f"import {name}\n" for name in used)
    path = write(tmp_path, f"{imports}def reward(p, rs): return {returned}\n")
    ranked = rank(path)
    assert ranked == scores and all(type(score) is float for score in ranked)


# ------------------------------------------------------------------------ the user's mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit(3)\n", r"does not import \(SystemExit\(3\)\) in line 2 of reward"),
        ("raise SystemExit\n", r"does not import \(SystemExit\(\)\)"),
        ("import absent_helper\n", "does not import .*No module named 'absent_helper'"),
        ("def reward(p, r:\n", "does not import .*SyntaxError.*1"),
        ("x = '\udce9'\n".encode("utf-8", "surrogateescape"), "does not import"),
        (b"\0", "does not import"),
        ("class Own(BaseException): pass\nraise Own\n", r"does not import \(Own\(\)\) in line 2"),
        ("def other(p, r): pass\n", "defines no function 'reward'"),
        ("reward = 3\n", "defines no function 'reward'"),
        ("class reward(list): pass\n", "defines no function 'reward'"),
        ("async def reward(p, r): return [1, 2]\n", "is async: give a plain function"),
        ("def reward(p): return [1]\n", r"\(p\) cannot be called with \(prompt, responses\)"),
        ("def reward(): return [1]\n", "cannot be called with"),
        ("def reward(p, r, extra): return [1]\n", "cannot be called with.*'extra'"),
        ("def reward(*, prompt, responses): return [1]\n", "cannot be called with"),
        ("def reward(p, r, finish_reasons, /): pass\n", "cannot be called with"),
        ("def reward(p, r): raise SystemExit\n", r"raised SystemExit\(\)"),
        ("def reward(p, r):\n  return [{}[x] for x in r]\n", r"raised KeyError\('a'\) in line 2"),
        ("def reward(p, r): yield {}[0]\n", r"raised KeyError\(0\)"),
        (
            "import asyncio\ndef reward(p, r): raise asyncio.CancelledError\n",
            "raised CancelledError",
        ),
        ("def reward(p, r): raise ValueError('two\\nlines')\n", "raised ValueError"),
        ("def reward(p, r): return '12'\n", "returned '12', not a list of numbers"),
        ("def reward(p, r): return b'12'\n", "not a list of numbers"),
        ("def reward(p, r): return ['1', '2']\n", "not a list of numbers"),
        ("def reward(p, r): return [None, 1]\n", "not a list of numbers"),
        ("def reward(p, r): return None\n", "returned None, not a list of numbers"),
        ("def reward(p, r): return 1.0\n", "returned 1.0, not a list of numbers"),
        ("def reward(p, r): return {0: 0.5, 1: 0.7}\n", "not a list of numbers"),
        ("def reward(p, r): return {0.5, 0.7}\n", "not a list of numbers"),
        ("def reward(p, r): return [[1.0], [2.0]]\n", "not a list of numbers"),
        ("def reward(p, r): return [1j, 2]\n", "not a list of numbers"),
        ("def reward(p, r): return [10**400, 2]\n", "not a list of numbers"),
        ("import numpy\ndef reward(p, r): return numpy.ones((2, 1))\n", "not a list of numbers"),
        ("import numpy\ndef reward(p, r): return list(numpy.ones((2, 1)))\n", "not a list of numb"),
        ("import numpy\ndef reward(p, r): return numpy.array('12')\n", "not a list of numbers"),
        ("import numpy\ndef reward(p, r): return numpy.array(['1', '2'])\n", "not a list of numb"),
        ("def reward(p, r): return (lambda: 1)\n", "not a list of numbers"),
        ("async def f(): return [1]\ndef reward(p, r): return f()\n", "not a list of numbers"),
        ("def reward(p, r): return [1.0]\n", "returned 1 scores for 2 responses"),
        ("def reward(p, r): return [1.0] * 5\n", "returned 5 scores for 2 responses"),
        (
            "import itertools\ndef reward(p, r): return itertools.count()\n",
            "returned 3 scores for 2",
        ),
        ("def reward(p, r): return [1.0, float('nan')]\n", "a score that is not finite"),
        ("def reward(p, r): return [1.0, -float('inf')]\n", "a score that is not finite"),
        ("def reward(p, r): return [1.0, 1e200]\n", "beyond 1e.100: "),
        ("def reward(p, r): return [0, 1]\nreward.terms = 3\n", "raised TypeError"),
        ("def reward(p, r): return [0, 1]\nreward.terms = lambda *a: 1\n", "its terms are"),
        ("def reward(p, r): return [0, 1]\nreward.terms = lambda *a: {'a': '1'}\n", "its terms"),
        ("def reward(p, r): return [0, 1]\nreward.terms = lambda *a: {'a': 1e999}\n", "its terms"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_what_is_the_user_s_mistake_is_one_line(tmp_path, text, message):
    path = tmp_path / "reward.py"
    path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        rank(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", ["absent.py", "folder.py"])
def test_a_file_that_is_none_is_named(tmp_path, name):
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(UserError, match=f"{name} does not exist"):
        opened(tmp_path / name)


@pytest.mark.parametrize("where", ["", "def reward(p, rs):\n "])
def test_an_interrupt_is_not_the_file_s_mistake(tmp_path, where):
    path = write(tmp_path, f"{where}raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        rank(path)


def test_a_file_that_changes_the_folder_changes_it_for_itself_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "import os\nos.chdir('/')\ndef reward(p, rs):\n os.chdir('/')\n return [1] * len(rs)\n"
    assert rank(write(tmp_path, text)) == [1.0, 1.0]
    assert os.getcwd() == str(tmp_path)


def test_terms_of_numpy_are_written_as_numbers(tmp_path):
    text = "import numpy\ndef reward(p, rs): return [0] * len(rs)\n"
    text += "reward.terms = lambda p, r, reason: {'length': numpy.int64(len(r))}\n"
    ranker = opened(write(tmp_path, text))
    terms = ranker.rank("p", ["a", "bb"], ["stop"] * 2).terms
    assert terms == [{"length": 1.0}, {"length": 2.0}]
    assert all(type(term["length"]) is float for term in terms)
