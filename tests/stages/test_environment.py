"""What the environment may say, and what of it must not change a result."""

import dataclasses
import os
import signal
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from scripts import convert
from scripts.plan import __main__ as plan
from sharding.errors import UserError
from stages import dpo, pairs, rank, sample
from stages.evaluate import __main__ as evaluate
from stages.files.run import run_main
from tests import tiny
from tests.stages.chain import refused, run_dpo

ROOT = Path(__file__).parents[2]
PAIRS = "-m stages.pairs --ranked ranked.jsonl --overwrite --out"
HOSTILE = {
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_DEBUG_NANS": "1",
    "JAX_DEBUG_INFS": "1",
    "JAX_DISABLE_JIT": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "7",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_CHECK_TRACER_LEAKS": "1",
    "JAX_EXPLICIT_X64_DTYPES": "error",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_RAISE_PERSISTENT_CACHE_ERRORS": "1",
    "JAX_COMPILATION_CACHE_DIR": "/proc/nowhere",
    "FLAX_ALWAYS_SHARD_VARIABLE": "1",
    "PYTHONWARNINGS": "error",
    "PYTHONIOENCODING": "ascii",
    "PYTHONOPTIMIZE": "1",
    "PYTHONHASHSEED": "3",
    "PYTHONUTF8": "1",
    "LC_ALL": "C",
    "HOME": "/proc/nowhere",
    "TMPDIR": "/proc/nowhere",
    "COLUMNS": "1",
    "NO_COLOR": "1",
}


def python(argv: str, folder, without: tuple[str, ...] = (), **environ):
    """Python by `argv`, in `folder`; stdin is closed."""
    known = {name: x for name, x in os.environ.items() if name not in without}
    return subprocess.run(
        ["bash", "-c", 'exec "$0" "$@" <&-', sys.executable, *argv.split()],
        cwd=folder,
        env=known | {"PYTHONPATH": str(ROOT)} | environ,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_a_hostile_environment_changes_no_answer(base, tmp_path):
    flags = "--n 3 --max-new-tokens 12 --temperature 1 --slots 4 --dtype float32 --out"
    argv = f"-m stages.sample --checkpoint {base}/model --prompts {base}/prompts.jsonl {flags}"
    done = python(f"{argv} samples.jsonl", tmp_path, ("TERM",), **HOSTILE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples.jsonl").read_bytes() == (base / "samples.jsonl").read_bytes()
    ignored = [line for line in done.stderr.splitlines() if line.endswith("change the result")]
    names = {name for name in HOSTILE if name.startswith(("JAX_", "FLAX_"))}
    assert {line.partition("=")[0] for line in ignored} == names - {"JAX_COMPILATION_CACHE_DIR"}


@pytest.mark.parametrize(
    "environ",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1", "COLUMNS": "1"},
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "COLUMNS": "0", "TERM": "dumb"},
        {"HOME": "/proc/nowhere", "TMPDIR": "/proc/nowhere", "COLUMNS": "-3"},
        {"PYTHONOPTIMIZE": "2", "PYTHONHASHSEED": "5"},
        {"COLUMNS": "many", "LINES": "x", "FORCE_COLOR": "1"},
    ],
    ids=lambda environ: ",".join(environ),
)
def test_a_stage_runs_whatever_the_terminal_and_the_folders_are(base, tmp_path, environ):
    ranked = tiny.read_jsonl(base / "ranked.jsonl")
    ranked[0]["mark"] = "é→\ud83d".encode("utf-8", "replace").decode()
    tiny.write_jsonl(tmp_path / "ranked.jsonl", ranked)
    plain = python(f"{PAIRS} plain.jsonl", tmp_path)
    done = python(f"{PAIRS} p→é.jsonl", tmp_path, ("TERM",), **environ)
    assert (plain.returncode, done.returncode, done.stderr) == (0, 0, "")
    assert (tmp_path / "p→é.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    assert done.stdout.replace("p→é", "plain") == plain.stdout
    help = python("-m stages.pairs --help", tmp_path, **environ)
    assert help.returncode == 0 and "ranked.jsonl" in help.stdout.replace("\n", "")


def test_files_in_another_encoding_are_refused_before_they_are_read(base, tmp_path):
    environ = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python(f"{PAIRS} out.jsonl", base, **environ)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "set PYTHONUTF8=1" in done.stderr and not (base / "out.jsonl").exists()


def test_closed_streams_are_no_files_of_the_stage(base, tmp_path):
    argv = f"-m stages.pairs --ranked {base}/ranked.jsonl --out {tmp_path}/p.jsonl".split()
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, *argv], cwd=ROOT
    )
    assert done.returncode == 0
    rows = tiny.read_jsonl(tmp_path / "p.jsonl")
    assert {row["prompt_id"] for row in rows} <= {
        row["prompt_id"] for row in tiny.read_jsonl(base / "ranked.jsonl")
    }


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("argv", ["--help", "--ranked {base}/ranked.jsonl --out {out}"])
def test_a_command_whose_output_nobody_reads_ends_quietly(base, tmp_path, argv, buffered):
    argv = argv.format(base=base, out=tmp_path / "p.jsonl").split()
    with subprocess.Popen(
        [sys.executable, "-m", "stages.pairs", *argv],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": buffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda"),
        ({"JAX_PLATFORMS": "tpu,cpux"}, "JAX_PLATFORMS=tpu,cpux"),
        ({"JAX_PLATFORMS": "nonsense"}, "JAX_PLATFORMS=nonsense"),
        ({"XLA_FLAGS": "--xla_no_such_flag=1"}, "Unknown flag in XLA_FLAGS: --xla_no_such_flag"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=x"}, "interpret value x for flag"),
        ({"XLA_FLAGS": "garbage"}, 'Could not open file "garbage"'),
    ],
)
def test_devices_that_are_not_there_are_one_line(base, tmp_path, environ, words):
    argv = f"-m stages.evaluate kl --checkpoint {base}/model --samples {base}/samples.jsonl --out"
    done = python(f"{argv} kl.json", tmp_path, **environ)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr
    assert "Traceback" not in done.stderr


# Of variables that are kept, as they are of use.
SPOILT = """
JAX_ENABLE_COMPILATION_CACHE=maybe JAX_LOG_COMPILES= JAX_EXPLAIN_CACHE_MISSES=2
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=fast JAX_COMPILATION_CACHE_MAX_SIZE=1e9
JAX_NUM_CPU_DEVICES=two JAX_NUM_CPU_DEVICES=² JAX_LOGGING_LEVEL=loud
JAX_CPU_COLLECTIVES_IMPLEMENTATION=x JAX_SEND_TRACEBACK_TO_RUNTIME=x
JAX_TRACER_ERROR_NUM_TRACEBACK_FRAMES=few JAX_TRACEBACK_FILTERING=x JAX_DUMP_IR_TO=/proc/x/y
""".split()
BEGINS = """
import sys
from sharding import processes
from stages.files.run import run_main

def main(args: processes.Flags):
    import jax
    from sharding import mesh
    print(jax.jit(lambda x: x + len(mesh.list_devices()))(1))

sys.exit(run_main(main, processes.Flags))
"""


@pytest.mark.parametrize("variable", SPOILT)
def test_a_variable_of_jax_with_a_spoilt_value_is_one_line(tmp_path, variable):
    (tmp_path / "begins.py").write_text(BEGINS)
    name, _, value = variable.partition("=")
    done = python("begins.py", tmp_path, **{"JAX_PLATFORMS": "cpu", name: value})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {variable}: ") and done.stderr.count("error:") == 1


# ---------------------------------------------------------------------------------- numbers

COMMANDS = {
    sample.Args: sample.main,
    rank.Args: rank.main,
    pairs.Args: pairs.main,
    dpo.Args: dpo.main,
    plan.Args: plan.main,
    **{command: evaluate.main for command in evaluate.COMMANDS},
    **{command: convert.main for command in typing.get_args(convert.Command)},
}
NUMBERS = [
    (command, field.name)
    for command in COMMANDS
    for field in dataclasses.fields(command)
    if field.type in (float, float | None)
]


SIZES = ["1e39", "1e300", "-1e31", "3.5e38", "1e-38", "-1e-31", "1e-45", "1e-300", "5e-324"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", *SIZES])
@pytest.mark.parametrize(
    ("command", "name"), NUMBERS, ids=lambda x: x if isinstance(x, str) else x.__name__
)
def test_every_number_is_finite_in_float32_too(capsys, command, name, value):
    needed = {f.name: "x" for f in dataclasses.fields(command) if f.default is dataclasses.MISSING}
    args = command(**needed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tyro.cli", lambda *_, **__: dataclasses.replace(args, **{name: float(value)})
        )
        code = run_main(COMMANDS[command], command)
    words = f"--{name.replace('_', '-')}", str(float(value))
    refused(capsys, code, *words)


@pytest.mark.parametrize("value", ["1.1e6", "3e6", "1e10", "1e20"])
def test_a_timeout_that_no_socket_takes_is_refused(capsys, value):
    words = ["judge", "--outputs", "x", "--reference", "x", "--out", "o", "--timeout", value]
    refused(capsys, run_main(evaluate.main, evaluate.Command, words), "--timeout is", "at most 1,")


def test_parameters_beyond_float32_are_never_saved(base, tmp_path, capsys):
    one_step = "--epochs", "1", "--batch-size", "64", "--learning-rate", "1e30"
    for _ in range(2):
        refused(capsys, run_dpo(base, tmp_path / "out", *one_step), "lower --learning-rate")
        assert not (tmp_path / "out").exists()


def test_all_flags_that_are_numbers_are_known():
    assert {name for _, name in NUMBERS} >= {"beta", "learning_rate", "weight_decay", "temperature"}
    assert {name for _, name in NUMBERS} >= {"max_shard_gb", "price", "timeout", "length_penalty"}


@pytest.mark.parametrize("command", ["compare", "score"])
def test_a_seed_that_numpy_does_not_take_is_refused(capsys, command):
    argv = {
        "compare": "--outputs x --baseline x --ranker x.py:y",
        "score": "--annotations x",
    }
    words = [command, *argv[command].split(), "--out", "o.json", "--seed", "-1"]
    refused(capsys, run_main(evaluate.main, evaluate.Command, words), "--seed is -1")


def test_an_error_is_one_line_whatever_it_holds(capsys):
    def main(args):
        raise UserError("two\nlines\u2028or three")

    assert run_main(main, pairs.Args, ["--ranked", "x", "--out", "y"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
