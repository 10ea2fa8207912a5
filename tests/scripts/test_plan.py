"""scripts.plan: counts against hand counts and XLA's, what does not fit, and the real compilers."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from scripts.bench import machine as rates
from scripts.bench.shapes import MISTRAL_7B
from scripts.plan import __main__ as command
from scripts.plan import compile as compiler
from scripts.plan import schedule, slices
from sharding import chips
from sharding.errors import UserError
from stages.files.output import Manifest
from stages.files.run import run_main

MISTRAL, GIB = "snorkel-mistral-7b", 2**30
PARAMETERS = 7_241_732_096
SMALL = dataclasses.replace(
    MISTRAL_7B,
    num_hidden_layers=2,
    hidden_size=512,
    intermediate_size=1024,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
)


def plan_of(machine="v5p-8", name=MISTRAL, **flags):
    return command.make(command.Args(name, machine, **flags))


@functools.cache
def _told(on, programs: str) -> list[dict]:
    return compiler.described(on, json.loads(programs), compiles=False)


def by_shapes(plan) -> dict[str, dict]:
    told = _told(plan.on, json.dumps(plan.programs()))
    return {each["name"]: each for each in told}


# -------------------------------------------------------------------------------- chips


@pytest.mark.parametrize(
    "topology,size,hosts,kind",
    [
        ("v5p:2x2x1", 4, 1, "tpu"),
        ("v5e:2x4", 8, 1, "tpu"),
        ("v5e:4x4", 16, 4, "tpu"),
        ("v6e:2x4", 8, 1, "tpu"),
        ("h100:8", 8, 1, "cuda"),
        ("h100:16", 16, 2, "cuda"),
    ],
)
def test_a_topology_is_read(topology, size, hosts, kind):
    on = slices.parse(topology)
    assert (on.size, on.hosts, on.compiler, str(on)) == (size, hosts, kind, topology)
    assert on.times(4).size == 4 * size


@pytest.mark.parametrize("topology", ["v5p:4", "v5e:2x2x1", "b200:8", "h100:0", "h100:", "v5p:"])
def test_a_topology_that_is_none_is_refused(topology):
    with pytest.raises(UserError, match=r"in the table|is no slice"):
        slices.parse(topology)


def test_an_axis_of_two_chips_has_one_link_a_longer_one_two():
    assert slices.parse("v5p:2x2x1").exchange == 600e9 * 2 / 6
    assert slices.parse("v5p:4x4x4").exchange == 600e9
    assert slices.parse("h100:8").exchange == 450e9
    assert slices.parse("h100:16").exchange == 50e9


def test_jax_names_of_devices_find_their_chips():
    for kind, name in (
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
    ):
        assert chips.of_kind(kind).name == name
    assert chips.of_kind("cpu") is None


def test_every_gpu_of_the_table_is_described_for_its_compiler():
    for chip in chips.CHIPS.values():
        if not chip.ports:
            text = (compiler.HERE / f"{chip.name}.target_config.txtpb").read_text()
            (memory,) = [line for line in text.splitlines() if "device_memory_size" in line]
            assert chip.memory < int(memory.split(":")[1]) < 1.1 * chip.memory


# --------------------------------------------------------------------------- operations


def flops(function, *shapes, trips=1) -> float:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return compiler.operations(jax.make_jaxpr(function)(*arrays).jaxpr, trips)


def test_products_are_counted_as_xla_counts_them():
    def network(x, v, w):
        return jnp.einsum("bth,bsh->bts", jnp.tanh(x @ v), x @ w).sum()

    shapes = (4, 32, 64), (64, 48), (64, 48)
    for function in (network, jax.value_and_grad(network, (1, 2))):
        arrays = [jnp.ones(shape) for shape in shapes]
        told = jax.jit(function).lower(*arrays).compile().cost_analysis()["flops"]
        assert flops(function, *shapes) == pytest.approx(told, rel=0.03)  # XLA: elementwise too
    assert flops(network, *shapes) == 2 * 4 * 32 * 64 * 48 * 2 + 2 * 4 * 32 * 32 * 48


def test_a_loops_body_counts_as_often_as_it_runs():
    product = 2 * 8**3

    def scanned(x):
        return jax.lax.scan(lambda y, _: (y @ x, None), x, None, length=7)[0]

    def until(x):
        return jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ x, x)

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x)

    assert flops(scanned, (8, 8)) == 7 * product
    assert flops(lambda x: until(scanned(x)), (8, 8), trips=5) == 12 * product
    assert flops(either, (8, 8)) == 2 * product
    # What a checkpoint computes again: with sin's argument kept only as an input, x @ x.
    again = jax.grad(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ x) @ x).sum()))
    plain = jax.grad(lambda x: jnp.sin(jnp.sin(x @ x) @ x).sum())
    assert flops(again, (8, 8)) > flops(plain, (8, 8)) == 6 * product


@pytest.mark.parametrize("stated", [None, 1234])
def test_a_kernel_counts_as_it_states_or_its_grid_times_its_body(stated):
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    block = pl.BlockSpec((8, 8), lambda i: (i, 0))
    cost = stated and pl.CostEstimate(flops=stated, transcendentals=0, bytes_accessed=0)
    call = pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[block, pl.BlockSpec((8, 8), lambda i: (0, 0))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((32, 8), jnp.float32),
        cost_estimate=cost,
    )
    assert flops(call, (32, 8), (8, 8)) == (stated or 4 * 2 * 8**3)


TEXT = """HloModule m

%inside (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %a = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"999"}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%inside, backend_config={"estimated_cycles":"10"}
  %g = bf16[4,8]{1,0} all-gather(%f), dimensions={0}
  ROOT %t = (s32[], f32[8]{0}) tuple(%p, %f)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %n = u32[] constant(6), metadata={}
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%until (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] constant(32)
  ROOT %c = pred[] and(%p, %n)
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %r = f32[8]{0} all-reduce(%p), to_apply=%add
  ROOT %s = f32[2]{0} dynamic-slice(%r)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w1 = (s32[], f32[8]{0}) while(%p), condition=%condition, body=%body
  %w2 = (s32[], f32[8]{0}) while(%p), condition=%until, body=%body
  %w3 = (s32[], f32[8]{0}) while(%p), condition=%until, body=%body, {"known_trip_count":{"n":"2"}}
  %moved = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p)
  %never = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"9223372036854775807"}
  %one = f32[8]{0} fusion(%p), calls=%all-reduce-scatter.1, {"estimated_cycles":"1"}
  %two = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), dimensions={0}
  ROOT %three = f32[8]{0} all-reduce(%p), to_apply=%add
}
"""


def test_cycles_and_exchange_are_read_off_a_compilers_text():
    told = compiler.compiled_work(TEXT, devices=4, trips=3)
    loops = 6 + 3 + 2  # by the condition, as given, and as the compiler says
    assert told["cycles"] == 10 * loops + 1
    # Three of four shares come from other devices; a reduction's numbers travel twice.
    gathered = 4 * 8 * 2 * loops + 8 * 4
    assert told["exchange"] == 0.75 * (gathered + 8 * 4 + 2 * 8 * 4 + 8 * 4)
    assert compiler.compiled_work(TEXT, devices=1)["exchange"] == 0


# ------------------------------------------------------------------------------ by shapes


def test_of_two_nodes_of_gpus_each_holds_a_copy_of_the_weights():
    plan = dataclasses.replace(plan_of("gpu-8x80gb"), on=slices.parse("h100:16"))
    assert (plan.meshes["sample"], plan.meshes["dpo"]) == ((2, 1, 8), (2, 8, 1))


def test_what_lies_in_memory_is_known_without_a_compiler():
    plan = plan_of()
    told = by_shapes(plan)
    assert plan.parameters == PARAMETERS
    assert not any("temporary" in each["parts"] for each in told.values())
    # Mistral-7B: 2 · 32 layers · 8 heads · 128 numbers of two bytes a position.
    step = told["sample: a step"]["parts"]
    assert step["cache"] == 131072 * 6144 * 256 / 4
    assert step["parameters"] == pytest.approx(2 * PARAMETERS / 4, rel=1e-3)
    assert told["sample: prompts"]["parts"] == step
    training = told["dpo: gradients"]["parts"]
    for part in ("parameters", "gradients", "moments"):  # RMSprop: one moment
        assert training[part] == pytest.approx(4 * PARAMETERS / 4, rel=1e-3)
    # PairRM: positions are projected by each layer.
    whole = 4 * (434e6 + 24 * 2 * 512 * 1024)
    assert told["rank: a layer"]["parts"]["parameters"] == pytest.approx(whole, rel=0.01)


def test_adamw_has_two_moments_and_a_variant_counts(monkeypatch):
    monkeypatch.setenv("VARIANT", "2024")
    plan = plan_of()
    assert (plan.training.optimizer, plan.training.batch_size) == ("adamw", 128)
    moments = by_shapes(plan)["dpo: gradients"]["parts"]["moments"]
    assert moments == pytest.approx(2 * 4 * PARAMETERS / 4, rel=1e-3)


def test_operations_are_those_of_weights_and_attention():
    layers, vocabulary = 32 * 218_103_808, 32000 * 4096
    told = by_shapes(plan_of())
    # A step multiplies 256 slots with every weight, and attends to 6,144 positions.
    step = 2 * 256 * (layers + vocabulary) + 4 * 32 * 32 * 128 * 256 * (6144 + 32)
    # Once in 32 steps their keys and values are moved into two blocks of the cache, by a product.
    step += 2 * 2 * 32 * 8 * 128 * 256 * 256
    assert told["sample: a step"]["flops"] == pytest.approx(step / 4, rel=0.01)
    # 32 pairs of 1,536 tokens: forward, the gradients, and forward again but for a layer's last
    # product, which no gradient needs; the vocabulary's for the responses alone; and attention.
    tokens, responses, down = 32 * 1536, 32 * 1024, 32 * 4096 * 14336
    least = (8 * layers - 2 * down) * tokens + 8 * vocabulary * responses
    assert least / 4 < told["dpo: gradients"]["flops"] < 1.1 * least / 4
    usual = told["dpo: gradients"]["usual"]["flops"]
    assert 0.5 < usual / told["dpo: gradients"]["flops"] < 0.7  # (195 + 2 · 362) / 1,536
    dense = 2 * 24 * 12 * 1024**2 * 8 * 2048 / 24
    assert 1.3 * dense < told["rank: a layer"]["flops"] < 2 * dense


# ------------------------------------------------------------------------------- the time


def made_up(**work) -> dict:
    work = {"flops": 0.0, "bytes": 0.0, "exchange": 0.0, "cycles": 0.0} | work
    return {"usual": work, "parts": {}}


def test_a_program_takes_what_it_is_bound_by_over_the_efficiency_or_the_compilers_cycles():
    plan = plan_of(efficiency=("sample=0.25",))
    for work, seconds in (
        ({"flops": 459e12, "bytes": 2765e9 / 2}, 4.0),
        ({"flops": 459e12, "bytes": 2 * 2765e9}, 8.0),
        ({"exchange": 3 * 200e9}, 12.0),
        ({"flops": 459e12, "cycles": 3 * 1.75e9}, 4.0),
        ({"flops": 459e12, "cycles": 9 * 1.75e9}, 9.0),
    ):
        stage = schedule.Stage("", "sample", 1, {"p": 2}, 7.0)
        took = plan.seconds(stage, {"p": made_up(**work)})
        assert took["work"] == pytest.approx(2 * seconds) and took["start"] == 7
    assert slices.parse("v5p:2x2x1").seconds(made_up(flops=459e12)["usual"], "float32")[
        "products"
    ] == pytest.approx(6)


def test_the_stages_draw_every_answer_rank_every_pair_and_train_on_what_is_left():
    stages = {stage.name: stage for stage in plan_of().stages()}
    steps = stages["sample"].programs["sample: a usual step"]
    least = 20000 * 5 * 420 / 256
    assert least < steps < least + 2048
    # 20 comparisons a prompt, 8 of them together on each of 4 chips, 24 layers.
    assert stages["rank"].programs["rank: a layer"] == 24 * 20000 * 20 / 8 / 4
    steps = 3 * -(-19000 // 64)
    forward = (19000 + 3 * 1000) / 32 / 4
    assert stages["dpo"].programs["dpo: gradients"] == 2 * steps + forward
    assert {name: stage.times for name, stage in stages.items()} == {
        "held-out answers": 4,
        "sample": 3,
        "rank": 3,
        "dpo": 3,
        "compare": 5,
        "kl": 5,
    }


def test_the_demos_prompts_are_counted_and_its_function_ranks_for_nothing():
    plan = plan_of("h100:1", "demo")
    assert (plan.prompts, plan.heldout, plan.pairrm) == (32, 96, False)
    assert plan.lengths[2] < 256 and plan.training.learning_rate == 5e-5
    assert {each["build"] for each in plan.programs()} == {"decode", "prefill", "gradients"}


@pytest.mark.parametrize(
    "machine",
    [
        "v5e-16",
        "gpu-8x80gb",
        *[pytest.param(m, marks=pytest.mark.heavy) for m in ("v5p-8", "v6e-8", "gpu-141gb")],
    ],
)
def test_every_machine_of_the_recipe_is_planned(machine):
    plan = plan_of(machine)
    told = by_shapes(plan)
    assert plan.hours(told) > 1 and plan.recipe.iterations == 3
    assert all(command.fits(each, plan) for each in told.values())


# ------------------------------------------------------------------------- what is printed


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(compiler, "installed", lambda kind: False)


def test_without_a_compiler_activations_are_said_to_be_left_out(no_compiler, capsys):
    assert run_main(command.main, command.Args, [MISTRAL, "--machine", "v5p-8"]) == 0
    shown = capsys.readouterr().out
    assert "Activations and exchange are left out" in shown
    assert "bash scripts/plan/setup.sh tpu" in shown


@pytest.mark.heavy
def test_one_80_gb_gpu_cannot_train_7b_and_the_plan_says_why(no_compiler, capsys):
    argv = [MISTRAL, "--machine", "h100:1", "--price", "2"]
    assert run_main(command.main, command.Args, argv) == 2
    shown = capsys.readouterr()
    assert "does not fit" in shown.out and "72 dollars" in shown.out
    (line,) = shown.err.strip().splitlines()
    assert "moments 27.0, parameters 27.0, gradients 27.0" in line
    assert "h100:1 has 78.0 GiB" in line and "h100:2 fits" in line


@pytest.mark.heavy
def test_what_would_make_it_fit_begins_with_what_costs_no_chips(no_compiler):
    plan = plan_of("v6e-8").changed("sample", slots=512)
    told = by_shapes(plan)["sample: a step"]
    assert not command.fits(told, plan)
    assert "v6e:2x4 fits with --slots 256" in command.refusal(plan, told, False)


@pytest.mark.parametrize(
    "flags,reason",
    [
        (["--machine", "v9:8"], "no chip 'v9'"),
        (["--machine", "tpu-9"], "has no machine tpu-9"),
        (["--machine", "h100:8", "--efficiency", "dpo=1.5"], "at most 1"),
        (["--machine", "h100:8", "--efficiency", "train=0.5"], "NAME=SHARE, of sample, rank, dpo"),
        (["--machine", "h100:8", "--efficiency", "dpo"], "NAME=SHARE"),
        (["--machine", "h100:8", "--price", "0"], "--price 0.0: it must be above 0"),
        (["--machine", "h100:8", "--compare", "nowhere"], "no finished stages"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, reason, capsys):
    assert run_main(command.main, command.Args, [MISTRAL, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error and len(error.splitlines()) == 1


def test_a_mesh_that_does_not_cover_the_chips_is_refused():
    with pytest.raises(UserError, match="sample: mesh -1 1 4 does not cover 2 chips"):
        dataclasses.replace(plan_of("v5p-8"), on=slices.parse("v5p:1x2x1"))


def test_help_answers_at_once():
    begun = time.perf_counter()
    code = "import sys, runpy; sys.argv = ['x', '--help']\n"
    code += "try: runpy.run_module('scripts.plan', run_name='__main__')\n"
    code += "except SystemExit as end: assert not {'jax', 'flax', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.perf_counter() - begun < 10  # 0.5 s where nothing else runs


def test_a_runs_own_times_stand_beside_the_plans(tmp_path, capsys, no_compiler):
    for folder, name, seconds in (
        ("start", "heldout.samples.jsonl", 120.0),
        ("iteration_1", "samples.jsonl", 150.0),
        ("iteration_1", "heldout.samples.jsonl", 130.0),
        ("iteration_1", "kl_to_start.json", None),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        manifest = Manifest("sample", {}, {}, {}, seconds=seconds)
        manifest.write(str(tmp_path / folder / f"{name}.manifest.json"))
    command.main(command.Args("demo", "h100:1", compare=str(tmp_path)))
    shown = capsys.readouterr().out.partition("of the run")[2]
    rows = [re.split(r" {2,}", line) for line in shown.splitlines()]
    rows = {row[0]: row[1:] for row in rows if len(row) > 3}
    assert rows["held-out answers"][1] == "120.0, 130.0" and rows["sample"][1] == "150.0"
    predicted, taken, share = map(float, rows["together"][:3])
    assert taken == 400 and share == pytest.approx(predicted / taken, abs=0.01)
    assert "kl" not in rows


# ---------------------------------------------------------------------- the real compilers


def small(machine: str):
    """The plan of a model of two layers, with small texts."""
    plan = dataclasses.replace(plan_of(machine), config=SMALL, lengths=(20, 20, 64))
    plan = plan.changed("sample", slots=8, max_new_tokens=64, mesh=None)
    flags = {"max_length": 64, "max_prompt_length": 32, "micro_batch_size": 8, "mesh": None}
    return plan.changed("dpo", **flags)


def test_the_plan_is_of_this_computer_where_no_machine_is_named(monkeypatch):
    monkeypatch.setattr(rates, "read_rate", lambda: 20e9)
    monkeypatch.setattr(
        rates, "gemm_rate", lambda library, dtype: {"float32": 3e11, "bfloat16": 1e12}[dtype]
    )
    plan = command.make(command.Args("demo"))
    assert plan.on.compiler == "cpu" and plan.on.size == 1
    assert (plan.on.chip.flops("float32"), plan.on.chip.flops("bfloat16")) == (3e11, 1e12)
    assert plan.on.chip.read == 20e9


def test_every_stages_programs_compile_for_this_cpu():
    """That they are built as the stages build them needs no TPU's compiler."""
    cpu = slices.Slice(dataclasses.replace(chips.CHIPS["h100"], name="cpu"), ())
    plan = dataclasses.replace(small("h100:1"), on=cpu)
    programs = plan.programs()
    for program in programs:
        if program["build"] == "layer":
            program["given"] |= {"rows": 1, "length": 32}
            program["usual"] = {}
    told = compiler.described(cpu, programs, compiles=True)
    found = {each["name"]: each["parts"] for each in told}
    held = 4 * plan.parameters
    for part in ("parameters", "gradients", "moments"):  # RMSprop: one moment
        assert found["dpo: gradients"][part] == pytest.approx(held, rel=1e-3)
    # k, v; layers, heads; float32, as a cache is on a CPU that computes in bfloat16
    assert found["sample: a step"]["cache"] == 2 * 2 * 4 * 64 * 8 * 128 * 4
    assert all(parts["temporary"] > 0 for parts in found.values())


def compiled(plan, *builds) -> dict[str, dict]:
    """By the real compiler, where it is installed."""
    if not compiler.installed(plan.on.compiler):
        pytest.skip(f"no compiler: bash scripts/plan/setup.sh {plan.on.compiler}")
    programs = [each for each in plan.programs() if not builds or each["build"] in builds]
    told = {each["name"]: each for each in compiler.described(plan.on, programs, True)}
    for name, each in told.items():
        parts = {part: f"{size / GIB:.2f}" for part, size in each["parts"].items()}
        print(f"{plan.on}, {name}: GiB a chip {parts}", each["usual"])
    return told


@pytest.mark.heavy
@pytest.mark.parametrize("machine", ["v5e:2x2", "h100:4"])
def test_a_small_models_programs_are_compiled_for_accelerators(machine):
    plan = small(machine)
    told = compiled(plan, "decode", "prefill", "gradients")
    for each in told.values():
        assert command.fits(each, plan) and each["parts"]["temporary"] > 0
        assert (each["cycles"] > 0) == (machine == "v5e:2x2") and each["exchange"] > 0
    for part in ("parameters", "gradients", "moments"):
        held = told["dpo: gradients"]["parts"][part]
        assert held == pytest.approx(4 * plan.parameters / 4, rel=0.02)


@pytest.mark.heavy
@pytest.mark.parametrize("machine", ["v5e-16", "v5p-8", "v6e-8", "gpu-8x80gb"])
def test_the_published_recipe_fits_its_machines(machine):
    plan = plan_of(machine)
    told = compiled(plan)
    command.show(f"{machine}, GiB per chip:", command.memory_table(plan, told))
    command.show(f"{plan.hours(told):.1f} hours, seconds:", command.time_table(plan, told))
    assert all(command.fits(each, plan) for each in told.values())
    assert told["sample: a step"]["parts"]["temporary"] < GIB  # the cache is there once
    if machine != "gpu-8x80gb":  # attention is a kernel there: no scores are in memory
        assert told["rank: a layer"]["parts"]["temporary"] < GIB


@pytest.mark.heavy
@pytest.mark.parametrize("machine,memory", [("v5e:2x4", 16), ("v5p:2x2x1", 95)])
def test_sampling_mistral_7b_fits_64_slots_of_2560_positions(machine, memory):
    tensor = slices.parse(machine).size
    plan = plan_of(machine, lengths=(195, 420, 512)).changed(
        "sample", slots=64, mesh=(1, 1, tensor)
    )
    for each in compiled(plan, "decode", "prefill").values():
        assert sum(each["parts"].values()) / GIB < 0.9 * memory
        assert each["parts"]["temporary"] < GIB  # the cache (2.5, 5) is there once


@pytest.mark.heavy
@pytest.mark.parametrize("machine,pairs,memory", [("v5p:2x2x1", 16, 60), ("v5e:4x4", 16, 14)])
def test_a_dpo_step_of_mistral_7b_with_adamw_fits(machine, pairs, memory):
    """Pairs at --max-length 1024: a prompt of 512 tokens, two responses of 512."""
    flags = {"optimizer": "adamw", "micro_batch_size": pairs, "mesh": (1, -1, 1)}
    (each,) = compiled(plan_of(machine).changed("dpo", **flags), "gradients").values()
    assert sum(each["parts"].values()) / GIB < memory


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pairrm_of_its_own_size_compiles_for_one_tpu_v5e_chip(dtype):
    plan = plan_of("v5e:1x1").changed("rank", dtype=dtype)
    (each,) = compiled(plan, "layer").values()
    assert each["parts"]["temporary"] < GIB  # no scores among them: of one layer 1 GiB and more
