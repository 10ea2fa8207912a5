"""scripts.bench accelerator: it runs where little is installed; its counts, its time, its table."""

import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from model import decoder
from scripts.bench import accelerator, kernel_profile, measuring, pieces, shapes, training_pieces

# What a bare image of an accelerator may lack.
ABSENT = "tyro tqdm psutil tensorboardX gguf sentencepiece tokenizers transformers torch".split()
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def bench(folder, *words, absent=ABSENT):
    """The command in a Python in which some packages cannot be imported."""
    (folder / "sitecustomize.py").write_text(BLOCK.format(absent=set(absent)))
    path = f"{folder}{os.pathsep}{os.getcwd()}"
    return subprocess.run(
        [sys.executable, "-m", "scripts.bench", "accelerator", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def given() -> measuring.Given:
    return measuring.Given(shapes.TINY, time.monotonic() + 600, {}, True)


# ------------------------------------------------------------------------- the whole command


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    done = bench(folder, "--tiny", "--minutes", "30", "--out", str(folder / "tiny.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "tiny.json").read_text()), (folder / "tiny.md").read_text()


def rows(told, piece):
    return {row["name"]: row for row in told[0]["pieces"][piece]["rows"]}


@pytest.mark.heavy
def test_every_piece_runs_where_little_is_installed(told):
    status = {name: found["status"] for name, found in told[0]["pieces"].items()}
    assert status == dict.fromkeys(accelerator.PIECES, "done") | {"transformers": "skipped"}
    assert told[0]["pieces"]["transformers"]["reason"] == "package torch is not installed"
    assert rows(told, "kernels") == {
        "none for this device": {"name": "none for this device"},
    }
    machine = told[0]["machine"]
    assert machine["platform"] == "cpu" and machine["jax"] == jax.__version__


@pytest.mark.heavy
def test_rates_and_shares_are_sane(told):
    for name, row in rows(told, "rates").items():
        assert next(x for key, x in row.items() if "per_second" in key) > 0, name
    assert set(rows(told, "decode")) == {"4 slots", "kernels of a step of 4 slots"}
    for piece in ("decode", "prefill", "pairrm"):
        for row in rows(told, piece).values():
            for key, x in row.items():
                if "share" in key:
                    assert 0 < x < 1.5, (piece, row)
                elif key not in ("name", "kernels", "finite", "seconds_to_compile"):
                    assert x > 0, (piece, key)
    assert all(row["finite"] for row in rows(told, "pairrm").values())
    c, row = shapes.TINY.model, rows(told, "decode")["4 slots"]
    assert row["tokens_per_second"] == pytest.approx(4e3 / row["ms_per_step"])
    # Of the 64 positions the last 32 are written, one at each step: 33 … 64 are read.
    read = sum(range(33, 65)) / 32 * 4 * 2 * c.num_hidden_layers * 2 * c.head_dim * 2
    assert row["live_cache_bytes"] == int(read)
    assert row["weights_bytes"] == 2 * (shapes.parameters(c) - c.vocab_size * c.hidden_size)


@pytest.mark.heavy
def test_a_profile_names_kernels_and_their_scopes(told):
    kernels = rows(told, "decode")["kernels of a step of 4 slots"]["kernels"]
    shares = [kernel["share"] for kernel in kernels]
    assert 3 <= len(kernels) <= 10 and shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1 + 1e-9
    assert any("draw" in k["scope"] or "attention" in k["scope"] for k in kernels)


@pytest.mark.heavy
def test_training_counts_its_operations_and_begins_at_ln_2(told):
    (row,) = rows(told, "dpo").values()
    c, sequences = shapes.TINY.model, shapes.pairs(shapes.TINY)
    assert row["tokens"] == sum(map(len, sequences)) >= shapes.TINY.tokens
    forward = 0  # counted one token, one matrix and one head at a time
    layer = decoder.abstract(c)["layers"]
    matrices = [x.size // c.num_hidden_layers for name, x in layer.items() if "norm" not in name]
    for sequence in sequences:
        for _ in range(len(sequence)):
            forward += c.num_hidden_layers * sum(2 * size for size in matrices)
        for response in sequence.responses:
            forward += len(response) * 2 * c.hidden_size * c.vocab_size
            for position in range(len(sequence.prompt) + len(response)):
                seen = position + 1
                scores = values = 2 * c.head_dim * seen
                forward += c.num_hidden_layers * c.num_attention_heads * (scores + values)
    assert row["reference_operations"] == forward and row["operations"] == 3 * forward
    assert row["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert 0 < row["mfu"] < row["mfu_gradients"] < 1.5 and 0 < row["mfu_reference"] < 1.5
    assert 0 < row["pairs_per_second_with_reference"] < row["pairs_per_second_at_2_layers"]
    assert row["memory_analysis_bytes"] > 16 * shapes.parameters(c)
    save, restore = rows(told, "checkpoint").values()
    assert restore["equal"] and save["gb_per_second"] > 0 and restore["gb_per_second"] > 0
    assert save["state_bytes"] >= 12 * shapes.parameters(c)


@pytest.mark.heavy
def test_the_table_holds_every_row(told):
    assert told[1].startswith("cpu, jax ")
    for name, found in told[0]["pieces"].items():
        for row in found["rows"]:
            assert f"| {row['name']} |" in told[1]
        if found["status"] == "skipped":
            assert f"| {name} | skipped | package torch is not installed |" in told[1]


def test_help_and_a_wrong_flag_need_no_jax(tmp_path):
    done = bench(tmp_path, "--help", absent=[*ABSENT, "jax", "flax", "numpy"])
    assert done.returncode == 0 and "--minutes" in done.stdout
    for words in (["--only", "sleep"], ["--minutes", "0"], ["--out", f"{tmp_path}/no/x.json"]):
        done = bench(tmp_path, *words, absent=[*ABSENT, "jax", "flax", "numpy"])
        assert done.returncode == 2 and f"{words[0]}" in done.stderr.splitlines()[-1]


# --------------------------------------------------------------------------------- its time


class Told:
    """A worker that tells what a test wants; an exception: it does not come up."""

    started = 0

    def __init__(self, answers):
        self.answers, self.facts = answers, {"device": "a card", "platform": "gpu"}
        self.kind, self.asked, self.pipe = "jax", [], self
        self.process = SimpleNamespace(kill=lambda: None)
        Told.started += 1

    def send(self, asked):
        self.asked.append(asked)

    def next(self, seconds):
        return next(self.answers)

    def end(self):
        pass


def test_a_piece_that_fails_hangs_or_dies_leaves_the_others_alone(tmp_path, monkeypatch):
    answers = iter(
        [
            ("row", {"name": "copy", "gb_per_second": 3000.0}),
            ("end", ("done", "", {"copy": 3e12})),
            ("end", ("failed", "ValueError: no", {"copy": 3e12})),
            ("row", {"name": "512 tokens", "ms": 1.0}),
            ("late", "nothing came"),
            ("died", "its process ended with exit code -9"),
            ("end", ("done", "", {})),
        ]
    )
    Told.started = 0
    monkeypatch.setattr(accelerator, "Worker", lambda kind, flags, seconds: Told(answers))
    words = ["--only=" + name for name in ("rates", "kernels", "prefill", "pairrm", "decode")]
    args = accelerator.parse([*words, "--out", str(tmp_path / "x.json")])
    accelerator.measure(args, accelerator.Report(args))
    found = json.loads((tmp_path / "x.json").read_text())["pieces"]
    assert {name: piece["status"] for name, piece in found.items()} == {
        "rates": "done",
        "kernels": "failed",
        "prefill": "out of time",
        "pairrm": "died",
        "decode": "done",
    }
    assert found["prefill"]["rows"] == [{"name": "512 tokens", "ms": 1.0}]
    assert Told.started == 3  # one for what hung, one for what died


def test_a_process_that_does_not_come_up_is_tried_once(tmp_path, monkeypatch):
    tried = []

    def start(kind, flags, seconds):
        tried.append(kind)
        if kind == "jax":
            raise RuntimeError("no driver")
        return Told(iter([("end", ("skipped", "torch sees no GPU", {}))]))

    monkeypatch.setattr(accelerator, "Worker", start)
    words = ["--only=rates", "--only=decode", "--only=transformers"]
    args = accelerator.parse([*words, "--out", str(tmp_path / "x.json")])
    accelerator.measure(args, accelerator.Report(args))
    found = json.loads((tmp_path / "x.json").read_text())["pieces"]
    assert [piece["reason"] for piece in found.values()] == [
        "no driver",
        "no driver",
        "torch sees no GPU",
    ]
    assert tried == ["jax", "torch"]


def test_a_piece_has_its_part_of_the_time_and_knows_the_rates(tmp_path, monkeypatch):
    end = ("end", ("done", "", {"copy": 3e12}))
    worker = Told(iter([end, end]))
    monkeypatch.setattr(accelerator, "Worker", lambda *_: worker)
    args = accelerator.parse(["--only=rates", "--only=decode", "--out", str(tmp_path / "x.json")])
    accelerator.measure(args, accelerator.Report(args))
    (_, first, none), (_, second, rates) = worker.asked
    assert 40 < first < 0.9 * 300 * 1.5 * 10 / 85 + 1 and 250 < second <= 0.9 * 300
    assert none == {} and rates == {"copy": 3e12}


def test_no_time_left_is_said_of_each_piece(tmp_path):
    args = accelerator.parse(["--minutes=0.001", "--out", str(tmp_path / "x.json")])
    accelerator.measure(args, accelerator.Report(args))
    found = json.loads((tmp_path / "x.json").read_text())["pieces"]
    assert {piece["status"] for piece in found.values()} == {"out of time"}


def test_an_unseen_accelerator_is_no_reason_to_measure_the_cpu(tmp_path, monkeypatch, capsys):
    worker = Told(iter([]))
    worker.facts = {"device": "cpu", "platform": "cpu"}
    monkeypatch.setattr(accelerator, "Worker", lambda *_: worker)
    monkeypatch.setattr(accelerator, "RESULTS", tmp_path / "results")
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(SystemExit) as ended:
        accelerator.main([])
    assert ended.value.code == 2 and "jax sees no accelerator" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_results_are_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "RESULTS", tmp_path)
    day = time.strftime("%Y-%m-%d")
    first = accelerator.unused("NVIDIA H100 80GB HBM3")
    assert first.name == f"NVIDIA-H100-80GB-HBM3-{day}.json"
    first.write_text("")
    assert accelerator.unused("NVIDIA H100 80GB HBM3").name == first.stem + "-2.json"


def test_a_folder_that_cannot_be_written_does_not_end_the_measuring(tmp_path, capsys):
    (tmp_path / "file").touch()
    args = accelerator.parse(["--minutes=0.001"])
    report = accelerator.Report(args)
    report.out = tmp_path / "file" / "x.json"
    accelerator.measure(args, report)
    assert "x.json cannot be written (File exists)" in capsys.readouterr().out
    assert {piece["status"] for piece in report.told["pieces"].values()} == {"out of time"}


# ----------------------------------------------------------------------------------- pieces


def test_7b_and_pairrm_are_counted_as_they_are():
    assert shapes.parameters(shapes.MISTRAL_7B) == 7_241_732_096
    # 0.88 TFLOP for 1,143 tokens: 24 layers of 12 d² weights, scores, positions and values.
    operations = shapes.comparison_operations(shapes.PAIRRM, 1143)
    assert operations == pytest.approx(0.876e12, rel=1e-3)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes.encoder(shapes.PAIRRM)))


@pytest.mark.parametrize("gib,layers", [(20, 2), (73.3, 15), (129, 27), (400, 32)])
def test_as_many_layers_are_trained_as_fit(gib, layers):
    found = training_pieces.training_layers(shapes.Sizes(), int(gib * 2**30))
    assert found == layers
    embeddings = 2 * 32000 * 4096
    assert 16 * (embeddings + layers * shapes.layer_weights(shapes.MISTRAL_7B)) < gib * 2**30


def test_training_goes_on_with_fewer_layers_where_memory_runs_out(monkeypatch):
    def steps(given, layers):
        if layers > 10:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
        yield {"name": f"{layers} layers"}

    monkeypatch.setattr(training_pieces, "_dpo_steps", steps)
    monkeypatch.setattr(measuring, "memory_limit", lambda: int(73.3 * 2**30))
    full = measuring.Given(shapes.Sizes(), time.monotonic() + 9, {})
    names = [row["name"] for row in training_pieces.dpo(full)]
    assert names == ["15 layers", "11 layers", "8 layers"]


def test_a_fused_kernel_is_compared_with_the_plain_form(monkeypatch):
    def make(sizes):
        return jnp.square, lambda x: 1.01 * x * x, (jnp.arange(1.0, 5.0),)

    monkeypatch.setattr(pieces, "KERNELS", {"squares": (lambda device: True, make)})
    (row,) = pieces.kernels(given())
    assert row["ms_plain"] > 0 and row["ms_fused"] > 0 and row["times_as_fast"] > 0
    assert row["relative_difference"] == pytest.approx(0.01, rel=1e-3)
    assert row["largest_difference"] == pytest.approx(0.16, rel=1e-3)


@pytest.mark.parametrize("kernel", pieces.KERNELS)
def test_a_fused_kernel_and_its_plain_form_give_the_same_shapes(kernel):
    plain, fused, arrays = pieces.KERNELS[kernel][1](shapes.TINY)
    wanted, got = jax.eval_shape(plain, *arrays), jax.eval_shape(fused, *arrays)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


def test_transformers_generate_is_timed():
    pytest.importorskip("torch")
    (row,) = pieces.transformers_generate(given())
    assert row["ms_per_step"] > 0 and row["prefill_tokens_per_second"] > 0


# ---------------------------------------------------------------------------------- profiles


def line(name, *events):
    made = [
        SimpleNamespace(name=n, start_ns=start, duration_ns=length, stats=stats.items())
        for n, start, length, stats in events
    ]
    return SimpleNamespace(name=name, events=made)


def read(monkeypatch, tmp_path, *planes, **more):
    profile = SimpleNamespace(
        planes=[SimpleNamespace(name=name, lines=lines) for name, *lines in planes]
    )
    (tmp_path / "x.xplane.pb").write_text("")
    reader = SimpleNamespace(from_file=lambda path: profile)
    monkeypatch.setattr(jax.profiler, "ProfileData", reader)
    return kernel_profile.largest(str(tmp_path), steps=2, **more)


def test_a_gpus_profile_is_read_by_its_streams(monkeypatch, tmp_path):
    found = read(
        monkeypatch,
        tmp_path,
        ("/host:CPU", line("python", ("jit(f)", 0, 9000, {}))),
        (
            "/device:GPU:0",
            line(
                "Stream #13(Compute)",
                ("nvjet_hsh_128x256", 0, 3000, {"hlo_op": "gemm_fusion_dot.7"}),
                ("loop_add_fusion_12", 3000, 500, {}),
                ("loop_add_fusion_3", 4000, 500, {"hlo_op": "loop_add_fusion.3"}),
            ),
            line("XLA Modules", ("jit_f", 0, 9000, {})),
        ),
        scope_of={
            "gemm_fusion_dot.7": "mlp/dot_general",
            "loop_add_fusion.3": "draw/add",
            "loop_add_fusion.12": "draw/add",
        },
    )
    assert [(k["kernel"], k["scope"], k["times_per_step"]) for k in found] == [
        ("nvjet_hsh_128x256", "mlp/dot_general", 0.5),
        ("loop_add_fusion", "draw/add", 1.0),
    ]
    assert found[0]["ms_per_step"] == 1.5e-3 and found[0]["share"] == 0.75


def test_a_tpus_profile_is_read_by_its_operations(monkeypatch, tmp_path):
    loop = ("%while.1 = (f32[]) while(%p)", 0, 1000, {})
    inside = ("%fusion.3 = f32[8] fusion(%a)", 100, 900, {})
    found = read(
        monkeypatch,
        tmp_path,
        ("/device:TPU:0", line("XLA Ops", loop, inside), line("Steps", ("1", 0, 5000, {}))),
        scope_of={"fusion.3": "attention/dot_general"},
    )
    assert [(k["kernel"], k["share"]) for k in found] == [("fusion", 0.9), ("while", 0.1)]


def test_an_empty_profile_is_said_to_be_one(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="wrote no profile"):
        kernel_profile.largest(str(tmp_path), {}, 1)
    with pytest.raises(ValueError, match="no kernels"):
        read(monkeypatch, tmp_path, ("/host:CPU", line("python")), scope_of={})


def test_scopes_are_read_from_a_compiled_program():
    def f(x):
        with jax.named_scope("mlp"):
            return jax.jit(jnp.tanh)(x @ x)

    text = jax.jit(f).lower(jnp.ones((8, 8))).compile().as_text()
    assert {"mlp/dot_general", "mlp/tanh"} <= set(kernel_profile.scopes(text).values())
