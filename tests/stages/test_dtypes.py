"""--dtype auto: what it is where, and that a run keeps the dtype that it began with."""

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from model import checkpoint, gates, generate, precision
from sharding import processes
from sharding.errors import UserError
from stages.evaluate import kl
from stages.files import dtypes
from stages.files.output import Manifest, manifest_path, read_manifest
from stages.files.run import Stopped, run_main
from tests import tiny
from tests.stages.chain import refused, run_dpo, run_sample

UNPATCHED = precision.cpu_multiplies_bf16.__wrapped__  # neither kept nor replaced by a fixture


@pytest.fixture
def cpu(monkeypatch):
    """A call cpu(True) makes this machine one that multiplies in bf16, cpu(False) one that does
    not."""

    def make(does: bool) -> None:
        monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: does)

    return make


@pytest.mark.parametrize(
    "flags,does",
    [
        ("fpu sse avx512f amx_bf16 amx_tile", True),
        ("fpu avx512_bf16", True),
        ("fpu avx512f avx512_vnni avx_bf16x", False),
        (None, False),  # no such file
    ],
)
def test_which_cpus_multiply_in_bf16(tmp_path, monkeypatch, flags, does):
    def opened(path):
        assert path == "/proc/cpuinfo"
        return open(tmp_path / "cpuinfo")

    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(precision, "open", opened, raising=False)
    assert UNPATCHED() is does


def test_what_auto_is(cpu):
    for does, name in ((True, "bfloat16"), (False, "float32")):
        cpu(does)
        assert precision.resolved("auto") == precision.resolved("auto", "cpu") == name
        assert precision.resolved("auto", "tpu") == precision.resolved("auto", "gpu") == "bfloat16"
        assert precision.resolved("float32", "tpu") == "float32"


@pytest.mark.parametrize("stage", ["sample", "dpo", "evaluate kl"])
def test_auto_is_the_same_in_every_stage_and_gives_way_to_what_is_asked(cpu, stage):
    for does, name in ((True, "bfloat16"), (False, "float32")):
        cpu(does)
        for asked, settled in (("auto", name), ("bfloat16", "bfloat16"), ("float32", "float32")):
            manifest = Manifest(stage, {"dtype": asked}, {}, {})
            assert dtypes.settle_dtype(manifest, []) == settled


def dtype_of(path) -> str:
    return read_manifest(str(path)).arguments["dtype"]


def test_the_manifest_has_the_dtype_that_auto_is_and_a_finished_file_stays(
    base, tmp_path, cpu, capsys
):
    out = str(tmp_path / "s.jsonl")
    cpu(True)
    assert run_sample(base, out=out) == 0
    assert dtype_of(out) == "bfloat16" and "computing in bfloat16 (auto" in capsys.readouterr().out
    cpu(False)
    assert run_sample(base, out=out) == 0
    said = capsys.readouterr().out
    assert "is finished already" in said and "computing in" not in said
    assert run_sample(base, "--dtype", "bfloat16", out=out) == 0
    code = run_sample(base, "--dtype", "float32", out=out)
    refused(capsys, code, 'dtype "bfloat16" there, "float32" here', "--overwrite")
    # Another run takes its place, and has the dtype of this machine.
    assert run_sample(base, "--top-k", "5", "--overwrite", out=out) == 0
    assert dtype_of(out) == "float32"


@pytest.mark.parametrize("begun,other", [(False, True), (True, False)])
def test_a_sampling_that_goes_on_keeps_its_dtype(base, tmp_path, monkeypatch, cpu, begun, other):
    """Also one that an earlier version began, whose default was float32."""
    out, name = tmp_path / "s.jsonl", "bfloat16" if begun else "float32"
    run = generate.Sampler.run

    def stopping(self, *words):
        for i, answered in enumerate(run(self, *words)):
            if i == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield answered

    cpu(begun)
    more = () if begun else ("--dtype", "float32")
    with monkeypatch.context() as patch:
        patch.setattr(generate.Sampler, "run", stopping)
        assert run_sample(base, *more, out=str(out)) == 75
    assert dtype_of(f"{out}.partial") == name
    cpu(other)
    assert run_sample(base, out=str(out)) == 0
    assert dtype_of(out) == name
    monkeypatch.undo()
    cpu(begun)
    assert run_sample(base, out=str(tmp_path / "whole.jsonl")) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_file_that_replaces_another_goes_on_in_its_own_dtype(base, tmp_path, monkeypatch, cpu):
    """Beside the file that --overwrite replaces lies the one in the making."""
    out = str(tmp_path / "s.jsonl")
    assert run_sample(base, out=out) == 0

    def stopped(*_):
        raise Stopped("stands for a kill before the first answer")

    cpu(True)
    more = "--top-k", "5", "--overwrite"
    with monkeypatch.context() as patch:
        patch.setattr(generate.Sampler, "run", stopped)
        assert run_sample(base, *more, out=out) == 75
    cpu(False)
    assert dtype_of(out) == "float32" and dtype_of(f"{out}.partial") == "bfloat16"
    assert run_sample(base, *more, out=out) == 0
    assert dtype_of(out) == "bfloat16"


def test_a_training_keeps_its_dtype(base, tmp_path, stopped, cpu, capsys):
    out = stopped
    kept = json.loads((tmp_path / "out.work/manifest.json").read_text())
    assert kept["arguments"]["dtype"] == "float32"
    cpu(True)
    capsys.readouterr()
    code = run_dpo(base, out, "--dtype", "bfloat16")
    refused(capsys, code, 'dtype "float32" there, "bfloat16" here', "out.work")
    assert run_dpo(base, out) == 0
    assert "computing in float32 (auto: this run began with it)" in capsys.readouterr().out
    assert checkpoint.read_manifest(str(out))["origin"]["arguments"]["dtype"] == "float32"
    assert run_dpo(base, out) == 0
    said = capsys.readouterr().out
    assert "is finished already" in said and "computing in" not in said
    refused(capsys, run_dpo(base, out, "--dtype", "bfloat16"), 'dtype "float32" there')


def test_a_distance_keeps_its_dtype(base, tmp_path, cpu, capsys):
    out = str(tmp_path / "kl.json")
    argv = ["--checkpoint", f"{base}/other", "--samples", f"{base}/samples.jsonl", "--out", out]
    cpu(True)
    assert run_main(kl.main, kl.Kl, argv) == 0
    cpu(False)
    assert run_main(kl.main, kl.Kl, argv) == 0
    assert dtype_of(out) == "bfloat16" and "is finished already" in capsys.readouterr().out


def a_manifest(dtype: str, **more) -> Manifest:
    return Manifest("sample", {"n": 3, "dtype": dtype}, {}, {}, **more)


def test_the_dtype_of_another_run_is_not_taken(cpu):
    cpu(True)
    for other in (
        Manifest("sample", {"n": 4, "dtype": "float32"}, {}, {}),
        Manifest("sample", {"n": 3}, {}, {}),
        Manifest("sample", ["edited"], {}, {}),
        a_manifest("auto"),
    ):
        assert dtypes.settle_dtype(a_manifest("auto"), [other]) == "bfloat16"
    same = a_manifest("float32")
    assert dtypes.settle_dtype(a_manifest("auto"), [other, same]) == "float32"


def test_all_processes_take_what_process_0_says(cpu, monkeypatch):
    """Process 0 sees the file that was begun, or another CPU."""
    cpu(False)
    monkeypatch.setattr(processes, "from_first", lambda values: values * 0 + [1, 1])
    manifest = a_manifest("auto")
    assert dtypes.settle_dtype(manifest, []) == "bfloat16" == manifest.arguments["dtype"]


def test_a_manifest_that_cannot_be_read_is_refused_as_before(base, tmp_path, capsys):
    out = tmp_path / "s.jsonl"
    tiny.write_jsonl(out, [{"prompt_id": "a"}])
    (tmp_path / "s.jsonl.manifest.json").write_text("{}")
    assert manifest_path(str(out)) == str(tmp_path / "s.jsonl.manifest.json")
    refused(capsys, run_sample(base, out=str(out)), "not a manifest")


@pytest.mark.parametrize(
    "trainer,sampler,words",
    [
        ("float32", {"float32"}, "although both computed in float32"),
        ("float32", set(), "(sampled in bfloat16?)"),
        ("float32", {"bfloat16"}, None),
        ("bfloat16", {"bfloat16"}, None),
        ("bfloat16", set(), None),
    ],
)
def test_the_sampler_may_differ_by_a_rounding_that_was_asked_for(trainer, sampler, words, capsys):
    pair = SimpleNamespace(chosen=[1] * 10, rejected=[1] * 5, sampled=(-20.0, -10.0))
    theirs = np.array([[-20.5, -10.25]])  # 0.05 per token
    gates.check_sampler("pairs.jsonl", [pair], theirs, trainer, sampler)
    said = capsys.readouterr().out
    assert ("warning" in said) == (words is not None) and (words or "") in said
    with pytest.raises(UserError, match="differ from the trainer's"):
        gates.check_sampler("pairs.jsonl", [pair], theirs - 5, trainer, sampler)


def test_the_dtypes_of_a_stage_are_those_of_its_manifests():
    tables = [("sample", {"dtype": "bfloat16"}), ("rank", {"dtype": "float32"}), ("sample", [])]
    made_of = [{"stage": stage, "arguments": table} for stage, table in tables]
    assert dtypes.dtypes_of(made_of, "sample") == {"bfloat16"}
    assert dtypes.dtypes_of(made_of, "dpo") == set()
