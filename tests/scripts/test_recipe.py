"""scripts.recipe: what a recipe may hold, what is refused, and which settings bind a run."""

import dataclasses
import math
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tyro import cli

from scripts import recipe as recipes
from sharding.errors import UserError
from stages import dpo, pairs, rank, sample

ROOT = Path(__file__).parents[2]
SNORKEL = "snorkel-mistral-7b"
OWN = """
model = "gguf:m.gguf"
ranker = "reward.py:reward"
iterations = 2
prompts = "prompts.jsonl"
heldout = "prompts.jsonl"

[sample]
n = 4
stop_strings = ["User:"]

[dpo]
beta = 0.2
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A recipe of one's own, which a test may add to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("{}\n")

    def write(*changes: tuple[str, str], more: str = "") -> str:
        text = OWN
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "own.toml").write_text(text + more)
        return "own.toml"

    return write


def refusal(*arguments, **environ) -> str:
    with pytest.raises(UserError) as refused:
        recipes.read(*arguments, environ=environ)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ------------------------------------------------------------------------------- recipes


def test_the_demo_asks_for_what_it_always_did(monkeypatch):
    """The flags of the demo's shell recipe, as the stages read them."""
    monkeypatch.chdir(ROOT)
    recipe = recipes.read("demo", environ={})
    drawn = "--temperature 0.7 --top-p 0.9 --max-new-tokens 96 --dtype float32"
    training = (
        "--beta 0.1 --learning-rate 5e-5 --schedule linear --warmup-ratio 0 --batch-size 4 "
        "--micro-batch-size 4 --max-length 512 --max-prompt-length 256 --dtype float32"
    )
    for table, stage, flags in (
        (recipe.sample, sample.Args, f"--n 5 {drawn} --slots 160"),
        (recipe.evaluate["sample"], sample.Args, f"--n 1 {drawn} --slots 96"),
        (recipe.dpo, dpo.Args, training),
    ):
        assert parsed(stage, recipes.flags(table)) == parsed(stage, flags.split())
    assert recipe.evaluate["kl"] == {"prompts": 32, "dtype": "float32"}
    assert recipe.rank == recipe.pairs == recipe.machine == {}
    assert (recipe.iterations, recipe.export_dtype) == (3, "float32")
    folder = "scripts/recipes/demo"
    assert recipe.source(0) == (f"{folder}/heldout.jsonl", None, 0, None)
    assert recipe.source(2) == (f"{folder}/train_2.jsonl", None, 0, 32)
    assert recipe.source(2, limit=8) == (f"{folder}/train_2.jsonl", None, 0, 8)


def parsed(stage: type, flags: list[str]):
    """A stage's Args by its own command line; its paths are made up."""
    required = (f for f in dataclasses.fields(stage) if f.default is dataclasses.MISSING)
    return cli(stage, args=[*(f"--{field.name}=x" for field in required), *flags])


@pytest.mark.parametrize("name", sorted(path.stem for path in recipes.RECIPES.glob("*.toml")))
def test_the_stages_read_every_recipe_on_every_machine(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    machines = recipes.tomllib.loads((recipes.RECIPES / f"{name}.toml").read_text())
    for machine in ("", *machines.get("machine", {})):
        recipe = recipes.read(name, machine, {})
        stages = {"sample": sample, "rank": rank, "pairs": pairs, "dpo": dpo}
        for table, module in stages.items():
            flags = recipes.flags(getattr(recipe, table))
            args = parsed(module.Args, flags)
            for key, value in getattr(recipe, table).items():
                read = getattr(args, key)
                assert (list(read) if isinstance(read, tuple) else read) == value


def test_the_published_recipe_asks_for_the_published_settings():
    for variant, numbers in (
        ("", (0.1, "linear", "rmsprop", 3, 64)),
        ("2024", (0.01, "cosine", "adamw", 1, 128)),
    ):
        recipe = recipes.read(SNORKEL, environ={"VARIANT": variant})
        keys = ("beta", "schedule", "optimizer", "epochs", "batch_size")
        assert tuple(recipe.dpo[key] for key in keys) == numbers
        assert recipe.dpo["learning_rate"] == 5e-7 and recipe.dpo["max_length"] == 1024
        assert recipe.sample["n"] == 5 and recipe.evaluate["sample"]["n"] == 1
        assert "test_count" not in recipe.pairs  # with LIMIT it would leave nothing to train on
    published = "snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset"
    assert recipe.source(2) == (published, "train_iteration_2", 0, None)
    assert recipe.source(0, 64) == (published, "test_iteration_1", 0, 64)


def test_ultrafeedback_is_cut_into_slices():
    recipe = recipes.read(SNORKEL, environ={"VARIANT": "2024,ultrafeedback", "DATASET": "/copy"})
    assert recipe.dpo["beta"] == 0.01
    assert recipe.source(3) == ("/copy", "train_prefs", 40000, 60000)
    assert recipe.source(3, 64) == ("/copy", "train_prefs", 40000, 40064)
    assert recipe.source(0) == ("/copy", "test_prefs", 0, 1000)


@pytest.mark.parametrize(
    "machine,plan,devices",
    [
        ("v5e-16", "v5e:4x4", 16),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v6e-8", "v6e:2x4", 8),
        ("gpu-8x80gb", "h100:8", 8),
        ("gpu-141gb", "h200:1", 1),
    ],
)
def test_a_machine_changes_nothing_but_where_and_how_fast(machine, plan, devices):
    ours, published = recipes.read(SNORKEL, machine, {}), recipes.read(SNORKEL, environ={})
    assert ours.machine["plan"] == plan
    assert recipes.settings_of(ours, 0, 0) == recipes.settings_of(published, 0, 0)
    # The meshes cover the devices, the batches the parts in which a mesh cuts them.
    for mesh in (ours.sample["mesh"], ours.evaluate["sample"]["mesh"], ours.dpo["mesh"]):
        product = math.prod(n for n in mesh if n != -1)
        assert product == devices or (-1 in mesh and devices % product == 0)
    slots, micro_batch = ours.sample["slots"], ours.dpo["micro_batch_size"]
    assert slots % devices == 0 and micro_batch % devices == 0
    assert ours.dpo["batch_size"] % micro_batch == 0


def test_adamw_on_one_gpu_is_refused_with_the_reason():
    assert "159 GB" in refusal(SNORKEL, "gpu-141gb", VARIANT="2024")
    assert recipes.read(SNORKEL, "gpu-141gb", {}).dpo["optimizer"] == "rmsprop"


# -------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "old,new,said",
    [
        ("beta", "betta", "unknown key dpo.betta: known are beta"),
        ("iterations", "iteration", "unknown key iteration: known are iterations"),
        ("[dpo]", "[dppo]", "unknown key dppo: known are dpo"),
        ("n = 4", "seed = 4", "unknown key sample.seed"),
        ("n = 4", "checkpoint = 'c'", "unknown key sample.checkpoint"),
        ("n = 4", "n = '4'", 'sample.n is "4": it must be a whole number'),
        ("n = 4", "n = true", "sample.n is true: it must be a whole number"),
        ("n = 4", "mesh = [1, 2]", "sample.mesh is [1, 2]: it must be a list of 3 times a whole"),
        ("n = 4", "dtype = 'bf16'", "it must be one of auto, float32, bfloat16"),
        ('["User:"]', '"User:"', "sample.stop_strings is"),
        ("beta = 0.2", "beta = 'high'", "it must be a number"),
        ("[sample]\nn = 4", "[sample.n]\nn = 4", "sample.n is"),
        ("iterations = 2", "", "iterations is missing"),
        ("iterations = 2", "iterations = 0", "it must be at least 1"),
        ("iterations = 2", "iterations = ", "is not TOML"),
        ('prompts = "prompts.jsonl"', 'prompts = "none.jsonl"', "none.jsonl does not exist"),
        ('prompts = "prompts.jsonl"', 'prompts = "s3://b/p.jsonl"', "s3:// is not supported"),
        ('prompts = "prompts.jsonl"', 'prompts = "https://h/p.jsonl"', "https:// is not supported"),
        ('prompts = "prompts.jsonl"', 'prompts = "file:///p.jsonl"', "file:// is not supported"),
        ('prompts = "prompts.jsonl"', "prompts = {split = 'a'}", "needs one of file and dataset"),
        ("beta = 0.2", "beta = 0.2\n[rank]\ndtype = 'bfloat16'", "reward.py:reward is a function"),
        ("beta = 0.2", "beta = 0.2\n[variant.a.dpo]\nbet = 1", "unknown key variant.a.dpo.bet"),
        ("beta = 0.2", "beta = 0.2\n[machine.a]\nplans = 'x'", "unknown key machine.a.plans"),
        ("beta = 0.2", "beta = 0.2\n[machine.a]\nplan = 3", "machine.a.plan is 3"),
        ("[sample]\nn = 4", "[[sample]]\nn = 4", "sample is [{"),
        ("[dpo]", "[evaluate]\nkl = 3\n[dpo]", "evaluate.kl is 3: it must be a table"),
        ('prompts = "prompts.jsonl"', "prompts = 3", "prompts is 3: it must be a table"),
        ('prompts = "prompts.jsonl"', 'prompts = ""', "prompts.file:  does not exist"),
        ('prompts = "prompts.jsonl"', "prompts = {file = 'a', dataset = 'b'}", "needs one of"),
        ("iterations = 2", "iterations = 2\nvariant = 'a'", 'variant is "a": it must be a table'),
        ("beta = 0.2", f"beta = {'[' * 3000}", "is not TOML"),
        ("beta = 0.2", "beta = nan", "dpo.beta is NaN: it must be a number"),
        ("beta = 0.2", "beta = -inf", "dpo.beta is -Infinity: it must be a number"),
        ("beta = 0.2", "max_grad_norm = inf", "dpo.max_grad_norm is Infinity: it must be a number"),
        ("n = 4", "temperature = inf", "sample.temperature is Infinity: it must be a number"),
        ("m.gguf", "m\\u0000", 'model is "gguf:m\\u0000": it must be a text, no flag'),
        ("iterations = 2", "iterations = 1000000000000", "it must be at least 1, at most 1000"),
        ('["User:"]', '["--n", "7"]', "it must be a list of a text, no flag"),
        ('["User:"]', '["User:", "--"]', "it must be a list of a text, no flag"),
        ('["User:"]', '["-x"]', "it must be a list of a text, no flag"),
        ("gguf:m.gguf", "--help", 'model is "--help": it must be a text, no flag'),
        (
            'ranker = "reward.py:reward"',
            'ranker = "R"\nrank = {comparisons = "best", aggregation = "max_wins"}',
            "--aggregation is for --comparisons full",
        ),
        ('prompts = "prompts.jsonl"', "prompts = {file = 'prompts.jsonl', split = 'a'}", "split"),
        (
            'prompts = "prompts.jsonl"',
            "prompts = {file = 'prompts.jsonl', first = 9, last = 3}",
            "prompts takes no rows (first = 9, last = 3)",
        ),
        (
            'prompts = "prompts.jsonl"',
            "prompts = {file = 'prompts.jsonl', rows_per_iteration = 0}",
            "prompts takes no rows (rows_per_iteration = 0)",
        ),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_file_and_key(own, old, new, said):
    line = refusal(own((old, new)))
    assert said in line and line.startswith("own.toml")


def test_what_is_not_there_is_refused_with_what_is(own):
    assert "demo, snorkel-mistral-7b" in refusal("nothing")
    assert "give snorkel-mistral-7b v5p-8" in refusal("mistral-v5p-8")
    assert "has no machine v9: it has v5e-16, v5p-8" in refusal(SNORKEL, "v9")
    assert "has no variant 2023: it has 2024" in refusal(SNORKEL, VARIANT="2023")
    assert "has no machine a: it has none" in refusal(own(), "a")
    assert "VARIANT=2024" in refusal(SNORKEL, ZEPHYR="2024")
    several = own(('"prompts.jsonl"\nheldout', '"p_{iteration}.jsonl"\nheldout'))
    Path("p_1.jsonl").write_text("")
    assert "p_2.jsonl does not exist" in refusal(several)


def test_the_environment_changes_the_keys_that_the_recipe_names_and_no_others(own):
    more = '[from_environment]\nBETA = "dpo.beta"\nMINE = "model"\nN = "sample.n"\nD = "rank.dtype"'
    name = own(("reward.py:reward", "pairrm"), more=more)
    environ = {"BETA": "1", "MINE": "m", "N": "7", "D": "bfloat16", "SLOTS": "3"}
    recipe = recipes.read(name, environ=environ)
    assert (recipe.dpo["beta"], recipe.model, recipe.sample["n"]) == (1, "m", 7)
    assert recipe.rank == {"dtype": "bfloat16"} and "slots" not in recipe.sample
    assert recipes.read(name, environ={"N": ""}).sample["n"] == 4
    assert "N=x: sample.n" in refusal(name, N="x")
    assert "D=half: rank.dtype" in refusal(name, D="half")
    assert "N=--5: sample.n" in refusal(name, N="--5")
    for key in ("dpo.n", "model.n", "prompts", ""):
        assert "no such key" in refusal(own(more=f'[from_environment]\nN = "{key}"'), N="3")


def test_a_variant_and_a_machine_may_name_a_file_of_prompts_in_short(own):
    Path("other.jsonl").write_text("{}\n")
    more = '[variant.a]\nprompts = "other.jsonl"\n[machine.b]\nheldout = "other.jsonl"'
    recipe = recipes.read(own(more=more), "b", {"VARIANT": "a"})
    assert recipe.prompts == recipe.heldout == {"file": "other.jsonl"}


def test_a_machines_environment_holds_names_of_variables_alone(own):
    more = '[machine.a]\nenvironment = {"X;touch y" = "1"}'
    assert "environment.X;touch y is no variable" in refusal(own(more=more), "a")


def test_a_shell_recipe_is_refused_and_translated(own, tmp_path):
    (tmp_path / "mine.sh").write_text(
        'start_model() { python -m scripts.convert from-gguf small "$1"; }\n'
        'train_prompts() { head -n 9 mine.jsonl >"$2"; }\n'
        'heldout_prompts() { cp mine.jsonl "$1"; }\n'
        'ITERATIONS=2\nRANKER=reward.py:reward\nDPO="--beta 0.3 --mesh 1 -1 1 --dtype=bfloat16"\n'
        'SAMPLE="--n 3 --shardings"\nHELDOUT_SAMPLE="--n 1"\nKL="--prompts 4"\n'
    )
    assert "from_shell.sh mine.sh" in refusal("mine.sh")
    for script in ("from_shell.sh", "iterate.sh"):
        refused = subprocess.run(
            ["bash", ROOT / "scripts" / script, tmp_path / "mine.sh"],
            capture_output=True,
            text=True,
        )
        assert refused.returncode == 2 and "recipes are TOML files now" in refused.stderr
        assert refused.stderr.count("\n") == 1
    shown = refused.stdout
    assert "from-gguf small" in shown and "head -n 9 mine.jsonl" in shown
    Path("mine.toml").write_text(shown.replace('file = ""', 'file = "prompts.jsonl"'))
    recipe = recipes.read("mine.toml", environ={})
    assert recipe.dpo == {"beta": 0.3, "mesh": [1, -1, 1], "dtype": "bfloat16"}
    assert recipe.sample == {"n": 3, "shardings": True} and recipe.iterations == 2
    assert recipe.evaluate["sample"]["n"] == 1 and recipe.evaluate["kl"] == {"prompts": 4}
    assert recipe.ranker == "reward.py:reward"


@pytest.mark.parametrize(
    "assigned,table,value",
    [
        ("SAMPLE='--top-p .5'", "sample", {"top_p": 0.5}),
        ("SAMPLE='--temperature 1.'", "sample", {"temperature": 1}),
        ("SAMPLE='--seed=1 --n 3'", "sample", {"seed": 1, "n": 3}),
        ("SAMPLE='--stop-strings User:'", "sample", {"stop_strings": ["User:"]}),
        ("SAMPLE='--stop-strings 1 2'", "sample", {"stop_strings": ["1", "2"]}),
        ("SAMPLE='--stop-strings *'", "sample", {"stop_strings": ["*"]}),
        ("SAMPLE='--stop-strings say:\"'", "sample", {"stop_strings": ['say:"']}),
        (r"SAMPLE='--stop-strings \n \t\'", "sample", {"stop_strings": ["\\n", "\\t\\"]}),
        ("SAMPLE='--no-shardings'", "sample", {"shardings": False}),
        ("DPO='--learning-rate 5E-7'", "dpo", {"learning_rate": 5e-7}),
        ("DPO='--learning-rate 5e+1 --beta -.1'", "dpo", {"learning_rate": 50, "beta": -0.1}),
        ("DPO='--loss=ipo'", "dpo", {"loss": "ipo"}),
        ("DPO=$NOWHERE", "dpo", None),
        ("echo a line", "dpo", None),
        (r"""RANKER='my "r".py:f\x'""", "ranker", 'my "r".py:f\\x'),
    ],
)
def test_each_word_of_a_shell_recipe_becomes_the_same_word_in_toml(
    tmp_path, assigned, table, value
):
    functions = "".join(
        f"{x}() {{ :; }}\n" for x in "start_model train_prompts heldout_prompts".split()
    )
    (tmp_path / "mine.sh").write_text(f"{functions}RANKER=r\n{assigned}\n")
    command = ["bash", ROOT / "scripts" / "from_shell.sh", tmp_path / "mine.sh"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert tomllib.loads(done.stdout).get(table) == value


# ---------------------------------------------------------------------- settings of a run


def shown(recipe: str, machine: str = "", **environ):
    """`python -m scripts.recipe`, and the variables that a shell gets of it."""
    return subprocess.run(
        [sys.executable, "-m", "scripts.recipe", recipe, *([machine] if machine else [])],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | environ,
    )


def test_a_run_goes_on_with_its_settings_alone(own):
    assert shown(own()).returncode == 0
    for change in (
        ("[dpo]", "# a comment\n[dpo]"),
        ("iterations = 2", "iterations = 5"),
        ("n = 4", "n = 4\nslots = 9\nmesh = [1, 1, 1]"),
        ("[dpo]", "[evaluate.kl]\nbatch_size = 3\n[dpo]"),
        ("n = 4", "n = 4\ndtype = 'float32'"),  # a stage refuses it where it began with another
        ("beta = 0.2", "beta = 0.2\nlearning_rate = 5e-7"),  # which is the stage's own
    ):
        assert shown(own(change)).returncode == 0
    for old, new, said in (
        ("beta = 0.2", "beta = 0.3", "dpo.beta was 0.2, now it is 0.3"),
        ("n = 4", "n = 4\ntemperature = 1", "sample.temperature was 0.7, now it is 1"),
        ("beta = 0.2", "", "dpo.beta was 0.2, now it is 0.1"),
        ("m.gguf", "o.gguf", 'model was "gguf:m.gguf", now it is "gguf:o.gguf"'),
    ):
        refused = shown(own((old, new)))
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert f"runs/own was begun with other settings ({said})" in refused.stderr
    own()
    assert "SEED was 0, now it is 3" in shown("own.toml", SEED="3", NAME="own").stderr
    assert "LIMIT was 0, now it is 3" in shown("own.toml", LIMIT="3").stderr
    assert shown("own.toml", SEED="3").returncode == 0  # in a folder of its own
    assert Path("runs/own-seed3/settings.json").exists()


def test_a_run_of_an_earlier_version_is_refused(own):
    Path("runs/own").mkdir(parents=True)
    Path("runs/own/settings").write_text("seed 0 limit 0 recipe 0123456789abcdef\n")
    refused = shown(own())
    assert refused.returncode == 2 and "runs/own was begun by an earlier version" in refused.stderr


def test_iterations_are_not_lowered_below_what_a_run_has_begun(own):
    name = own()
    Path("runs/own/iteration_3").mkdir(parents=True)
    refused = shown(name)
    assert refused.returncode == 2 and "runs/own is beyond iteration 2" in refused.stderr
    Path("runs/own/finished").write_text("")  # which the loop only tells
    assert shown(name).returncode == 0


def test_a_damaged_run_is_refused(own):
    name = own()
    assert shown(name).returncode == 0
    for content in ("{", "[1]", "[" * 100_000, b"\xff".decode("latin-1")):
        Path("runs/own/settings.json").write_text(content)
        refused = shown(name)
        assert refused.returncode == 2 and "settings.json is damaged" in refused.stderr
    Path("a_file").write_text("")
    refused = shown(name, NAME="a_file", RUNS=".")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("beta = 0.2", "beta = -1", "[dpo]: --beta is -1: it must be above 0"),
        ("beta = 0.2", "max_length = 8", "[dpo]: --max-prompt-length is"),
        ("n = 4", "n = 0", "[sample]: n is 0: it must be at least 1"),
        ("[dpo]", "[evaluate.sample]\ntop_p = 2\n[dpo]", "[evaluate.sample]: top_p is 2"),
        ("[dpo]", "[pairs]\ntest_fraction = 7\n[dpo]", "[pairs]: --test-fraction 7 must be"),
        ("[dpo]", "[pairs]\nseed = -1\n[dpo]", "[pairs]: --seed is -1: it must be at least 0"),
        ("[dpo]", "[evaluate.kl]\nprompts = 0\n[dpo]", "[evaluate.kl]: --prompts is 0"),
        ("[dpo]", "[evaluate]\nkl = {batch_size = -2}\n[dpo]", "[evaluate.kl]: --batch-size is"),
        ("[dpo]", '"two\\nlines" = 1\n[dpo]', "unknown key sample.two"),
    ],
)
def test_a_value_that_a_stage_would_refuse_is_refused_before_the_run(own, old, new, said):
    refused = shown(own((old, new)))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and said in refused.stderr
    assert not Path("runs").exists()


def test_bad_numbers_are_refused(own):
    assert "SEED=x" in shown(own(), SEED="x").stderr
    assert "LIMIT=-1" in shown(own(), LIMIT="-1").stderr
    alone = shown(own(), COORDINATOR="localhost:1", PROCESSES="2")
    assert alone.returncode == 2 and "PROCESS_ID=" in alone.stderr


def test_a_shell_gets_the_flags_word_by_word(own):
    name = own(("User:", "it's $HOME"), more='[machine.a]\nenvironment = {X = "1 2", Y = "3"}\n')
    done = shown(name, "a", Y="4", NAME="try", RUNS="elsewhere")
    script = (
        f'{done.stdout}\nprintf "%s|" "${{SAMPLE[@]}}" "$NAME" "$run" "$X" "$Y" "${{PROMPTS_2[@]}}"'
    )
    words = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={"Y": "4"}
    ).stdout.split("|")
    assert words[:5] == ["--n", "4", "--stop-strings", "it's $HOME", "try"]
    assert words[5:9] == ["elsewhere/try", "1 2", "4", "prompts.jsonl"]
    assert shlex.split(done.stdout)  # every quote is closed


def test_a_flag_for_gpus_that_repeat_every_bit_is_added_to_the_recipe_s(own):
    flags = "--xla_gpu_deterministic_ops=true"
    done = shown(SNORKEL, "gpu-8x80gb", XLA_FLAGS=flags)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("export XLA_FLAGS=")]
    assert line.endswith(f"scheduler=true {flags}'")
    assert done.returncode == 0, done.stderr  # and XLA knows it
    again = shown(SNORKEL, "gpu-8x80gb", XLA_FLAGS=shlex.split(line)[1].partition("=")[2])
    assert again.returncode == 0, again.stderr  # and the recipe's own


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_share_of_memory_that_the_user_set_stays_alone(name):
    """JAX refuses its two names together."""
    assert "MEM_FRACTION" in shown(SNORKEL, "gpu-141gb").stdout
    assert "MEM_FRACTION" not in shown(SNORKEL, "gpu-141gb", **{name: "0.5"}).stdout


@pytest.mark.parametrize("machine", ["gpu-8x80gb", "gpu-141gb"])
def test_a_gpu_that_jax_does_not_find_is_not_replaced_by_the_cpu(machine):
    platforms = "export JAX_PLATFORMS="
    assert f"{platforms}cuda,cpu" in shown(SNORKEL, machine).stdout
    assert platforms not in shown(SNORKEL, machine, JAX_PLATFORMS="cpu").stdout
