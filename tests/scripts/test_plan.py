"""scripts.plan: counts against hand counts, recipes, what does not fit, and the TPU's compiler."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from model import decoder
from scripts.plan import __main__ as command
from scripts.plan import arithmetic, fit, programs, published, schedule, slices
from scripts.plan.recipe import MISTRAL_7B, RECIPES, model_config, read
from sharding import chips
from sharding.errors import UserError
from stages import dpo, rank, sample
from stages.files.output import Manifest
from stages.files.run import run_main

MISTRAL = ["", "mistralai/Mistral-7B-Instruct-v0.2", ""]
DECODER = arithmetic.DecoderCost(model_config(MISTRAL))
LENGTHS = arithmetic.Lengths(prompt=200, answer=400, longest_prompt=512)
SMALL = MISTRAL_7B | {
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def plan_of(recipe="snorkel-mistral-7b", topology="v5p:2x2x1", **flags):
    args = command.Args(recipe, topology, **flags)
    found = read(recipe)
    return command.make(
        args, found, arithmetic.DecoderCost(model_config(found.start)), slices.parse(topology)
    )


def plan_command(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "scripts.plan", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


# -------------------------------------------------------------------------------- chips


@pytest.mark.parametrize(
    "topology,size,hosts",
    [
        ("v5p:2x2x1", 4, 1),
        ("v5e:2x4", 8, 1),
        ("v5e:4x4", 16, 4),
        ("v6e:2x4", 8, 1),
        ("h100:8", 8, 1),
        ("h100:16", 16, 2),
    ],
)
def test_a_topology_is_read(topology, size, hosts):
    on = slices.parse(topology)
    assert (on.size, on.hosts, str(on)) == (size, hosts, topology)


@pytest.mark.parametrize("topology", ["v5p:4", "v5e:2x2x1", "b200:8", "h100:0", "h100", "v5p"])
def test_a_topology_that_is_none_is_refused(topology):
    with pytest.raises(ValueError, match=r"in the table|is no slice"):
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


# ------------------------------------------------------------------------------- counts


def test_parameters_are_counted_as_the_model_declares_them():
    assert DECODER.parameters == 7_241_732_096
    for config in (DECODER.config, model_config(read("demo").start)):
        declared = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(decoder.abstract(config)))
        assert arithmetic.DecoderCost(config).parameters == declared


def training(mesh=(1, 1, 1), lengths=LENGTHS, pairs=64, **flags):
    flags = {"batch_size": 8, "micro_batch_size": 8, "dtype": "bfloat16", **flags}
    args = dpo.Args("C", "D", "C2", **flags)
    return arithmetic.TrainingCost(DECODER, args, lengths, pairs, 0, arithmetic.Mesh(*mesh))


def test_a_step_multiplies_six_times_weights_times_tokens_and_once_more_with_remat():
    one = training()
    shape = one.shape()
    tokens, responses = shape["t"] * shape["rows"], shape["responses"]
    layers, vocabulary = 32 * 218_103_808, 32000 * 4096
    found = {piece.name: piece for piece in one.step()}
    assert found["step, layers"].flops == pytest.approx(6 * layers * tokens)
    # The vocabulary product is computed again for its gradients.
    assert found["step, vocabulary"].flops == pytest.approx(8 * vocabulary * responses)
    again = {piece.name: piece for piece in training(remat="full").step()}
    assert again["step, layers"].flops == pytest.approx(8 * layers * tokens)
    # Four chips of fsdp: a quarter of the pairs each, and all but a quarter of the weights twice.
    four = {piece.name: piece for piece in training((1, 4, 1)).step()}["step, layers"]
    assert four.flops == pytest.approx(6 * layers * tokens / 4, rel=0.2)
    assert four.gathered == pytest.approx(2 * 2 * layers * 3 / 4)


@pytest.mark.parametrize(
    "chips,pairs,temporary",  # GiB a chip that the compilers of v5p:2x2x1 and v5e:4x4 ask for
    [(4, 16, 17.0), (16, 16, 4.91)],
)
def test_memory_is_counted_about_as_the_tpus_compiler_has_it(chips, pairs, temporary):
    """tests/model/test_tpu.py -k dpo: beside parameters, moments and the sum of gradients."""
    one = training((1, chips, 1), batch_size=64, micro_batch_size=pairs, remat="full")
    counted = one.memory()
    assert counted["parameters"] == 4 * 7_241_732_096 / chips
    found = counted["activations"] + counted["next gradients"]
    assert found == pytest.approx(temporary * 2**30, rel=0.1)


def test_useful_operations_are_those_of_the_metric_mfu():
    one = training(lengths=arithmetic.Lengths(200, 300, prompts=(200,)))
    sequences = one.sequences(256)
    tokens = sum(len(s) for s in sequences) / 256
    assert one.model_flops() == pytest.approx(8 * 6 * 7.11e9 * tokens, rel=0.02)
    assert {len(s.prompt) for s in sequences} == {200}
    assert np.mean([len(r) for s in sequences for r in s.responses]) == pytest.approx(300, rel=0.05)


def test_lengths_have_the_mean_that_is_asked_and_the_limit():
    for mean, limit in ((50, 96), (420, 2048), (96, 96)):
        drawn = arithmetic.quantiles(mean, limit, 4000)
        assert drawn.mean() == pytest.approx(mean, rel=0.02) and drawn.max() <= limit


def test_decoding_draws_every_answer_and_reads_weights_and_cache_once_a_step():
    args = sample.Args("C", "P", "S", n=5, max_new_tokens=2048, slots=64, dtype="bfloat16")
    mesh = arithmetic.Mesh(1, 1, 4)
    one = arithmetic.SamplingCost(DECODER, args, LENGTHS, 1000, mesh)
    weights, cache, _ = one.decode(64, 2560)
    assert weights.bytes == pytest.approx(2 * (7_241_732_096 - 32000 * 4096) / 4, rel=1e-4)
    assert weights.gathered == 0 and weights.awaited > 0
    # Mistral-7B: 2 · 32 layers · 8 heads · 128 numbers of two bytes a position.
    assert cache.bytes == 131072 * 2560 * 64 / 4 == one.memory()["cache"]
    steps = sum(p.times for p in one.pieces() if p.name == "weights")
    least = 5000 * 400 / 64
    assert least < steps < least + 2048 + 0.1 * least
    # Cut over fsdp, each chip gathers the others' weights at every step.
    fsdp = dataclasses.replace(one, mesh=arithmetic.Mesh(1, 4, 1)).decode(64, 2560)[0]
    assert fsdp.gathered == pytest.approx(2 * (7_241_732_096 - 32000 * 4096) * 3 / 4, rel=1e-4)


def test_pairrm_counts_comparisons_and_the_weights_of_deberta_large():
    one = arithmetic.RankingCost(rank.Args("R", "S", "K"), LENGTHS, 10, 5, slices.parse("v5e:1x1"))
    assert one.comparisons == 200
    products = one.pieces()[0]
    assert products.flops == 2 * 24 * 12 * 1024**2 * one.length
    assert one.memory()["parameters"] == pytest.approx(
        4 * (434e6 + 24 * 2 * 512 * 1024),
        rel=0.01,  # positions, projected by each layer
    )


def test_a_piece_is_bound_by_products_or_bytes_and_exchange_is_hidden_or_awaited():
    on = slices.parse("v5p:2x2x1")
    piece = arithmetic.Piece
    products = piece("", flops=459e12, bytes=2765e9 / 2)
    memory = piece("", flops=1.0, bytes=2765e9)
    both = arithmetic.seconds([products, memory], on, "bfloat16")
    assert (both.compute, both.memory, both.total) == (1, 1, 2)
    assert arithmetic.seconds([piece("", gathered=200e9), products], on, "bf16").total == 1
    assert arithmetic.seconds([piece("", awaited=200e9), products], on, "bf16").total == 2
    assert arithmetic.seconds([products], on, "fp32").total == pytest.approx(6)


def test_the_published_run_implies_a_believable_share_of_the_peak():
    a100, h100 = list(published.published(DECODER))[-2:]
    # By hand: 59,874 pairs · 1,084 tokens · 8 · 7.11e9 / 18,849 s / 8 GPUs = 24 TFLOP/s.
    assert "7.8%" in a100 and "17.9%" in a100
    assert "2.5%" in h100 and "5.6%" in h100


def test_training_stops_scaling_where_a_chip_has_no_pair():
    plan = plan_of()
    times = {}
    for on in published.slices(plan.on):
        step = published.scaled(plan, on, 1).step()
        times[on.size] = arithmetic.seconds(step, on, "bfloat16").total
    assert times[4] > 3 * times[16] > 3 * times[64]
    assert times[256] > 0.9 * times[64]


# ------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.sh")))
def test_every_recipe_is_read_and_planned(name):
    recipe = read(name)
    topology = recipe.topology or "h100:8"
    plan = plan_of(name, topology)
    assert plan.hours() > 0 and recipe.iterations == 3
    assert all(m.total > 0 for m in fit.by_arithmetic(plan))


def test_the_demos_prompts_are_counted_and_its_flags_are_the_stages_own(monkeypatch):
    recipe = read("demo")
    assert (len(recipe.prompts), len(recipe.heldout)) == (32, 96)
    assert recipe.sample.n == 5 and recipe.heldout_sample.n == 1
    assert recipe.dpo.learning_rate == 5e-5 and recipe.dpo.max_prompt_length == 256
    monkeypatch.setenv("LIMIT", "8")
    assert len(read("demo").prompts) == 8
    monkeypatch.setenv("ZEPHYR", "2024")
    assert read("snorkel-mistral-7b").dpo.optimizer == "adamw"


def test_a_recipe_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "bad.sh").write_text("ITERATIONS=3\nfalse\n")
    (tmp_path / "empty.sh").write_text("ITERATIONS=3\nstart_model() { cp -r x $1; }\n")
    with pytest.raises(UserError, match="no recipe nothing: give a file"):
        read("nothing")
    with pytest.raises(UserError, match="cannot be read as a recipe"):
        read(str(tmp_path / "bad.sh"))
    with pytest.raises(UserError, match="sets no RANKER"):
        read(str(tmp_path / "empty.sh"))


# --------------------------------------------------------------------- what does not fit


def test_one_80_gb_gpu_cannot_train_7b_and_the_plan_says_why():
    done = plan_command("snorkel-mistral-7b", "--topology", "h100:1", ZEPHYR="2024")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "moments and gradients alone are 116 GB" in line and "h100:1 has 78.0" in line
    assert "h100:2 fits" in line
    assert "does not fit" in done.stdout and "the whole run" in done.stdout


def test_what_would_make_it_fit_begins_with_what_costs_no_chips():
    plan = plan_of(topology="v6e:2x4")
    args = dataclasses.replace(plan.recipe.dpo, micro_batch_size=64, remat="none")
    plan = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, dpo=args))
    memory = fit.by_arithmetic(plan)[-1]
    assert not fit.fits(memory, plan.on)
    told = fit.remedy(plan, "dpo")
    assert "v6e:2x4 fits with --remat full" in told


@pytest.mark.parametrize(
    "flags,reason",
    [
        (["--topology", "v9:8"], "no chip 'v9'"),
        (["--topology", "h100:8", "--efficiency", "dpo=1.5"], "at most 1"),
        (["--topology", "h100:8", "--efficiency", "train=0.5"], "one of sample, rank, dpo"),
        (["--topology", "h100:8", "--efficiency", "nothing.json"], "JSON file"),
        (["--topology", "h100:8", "--price", "0"], "--price is 0"),
        (["--topology", "h100:8", "--compare", "nowhere"], "no finished stages"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, reason, capsys):
    assert run_main(command.main, command.Args, ["snorkel-mistral-7b", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error and len(error.splitlines()) == 1


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install libtpu.*--arithmetic"):
        programs.compiled(slices.parse("v5p:2x2x1"), {})


def test_efficiency_is_a_number_or_a_file_over_what_is_assumed(tmp_path):
    on = slices.parse("h100:8")
    (tmp_path / "bench.json").write_text(json.dumps({"dpo": 0.6}))
    found = schedule.efficiencies((str(tmp_path / "bench.json"), "rank=0.2"), on)
    assert found == {**schedule.ASSUMED, "dpo": 0.6, "rank": 0.2}


def test_a_runs_own_times_stand_beside_the_plans(tmp_path, capsys):
    for folder, name, seconds in (
        ("start", "heldout.samples.jsonl", 20.0),
        ("iteration_1", "samples.jsonl", 50.0),
        ("iteration_1", "heldout.samples.jsonl", 30.0),
        ("iteration_1", "kl_to_start.json", None),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        manifest = Manifest("sample", {}, {}, {}, seconds=seconds)
        manifest.write(str(tmp_path / folder / f"{name}.manifest.json"))
    command.main(command.Args("demo", "h100:1", compare=str(tmp_path)))
    shown = capsys.readouterr().out.partition(str(tmp_path))[2]
    rows = [[cell.strip() for cell in line.split("|")] for line in shown.splitlines()]
    rows = {row[1]: row[2:] for row in rows if len(row) > 3}
    assert rows["held-out answers"][1] == "20.0, 30.0" and rows["sample"][1] == "50.0"
    predicted, taken, share = map(float, rows["together"][:3])
    assert taken == 100 and share == pytest.approx(predicted / taken, abs=0.01)
    assert "kl" not in rows


# --------------------------------------------------------------------- the TPU's compiler


def test_every_stages_programs_compile_for_a_device_that_is_there():
    """This CPU: that they are built as the stages build them needs no TPU's compiler."""
    from model.config import from_hf

    plan = plan_of(topology="v5e:1x1")
    plan = dataclasses.replace(plan, decoder=arithmetic.DecoderCost(from_hf(SMALL)))
    work = fit.compiler_work(plan)
    work["sample"] |= {"slots": 4, "length": 64, "prefill": 32, "mesh": (1, 1, 1)}
    work["dpo"] |= {"pairs": 2, "prompt": 16, "length": 32, "mesh": (1, 1, 1)}
    work["rank"] |= {"rows": 1, "length": 32}
    work["rank"]["config"] |= {"num_hidden_layers": 2, "vocab_size": 512}
    held = 4 * plan.decoder.parameters
    found = {}
    for stage, given in work.items():
        for name, _, parts in programs._stage(stage, given, jax.devices()[:1]):
            assert min(parts.values()) >= 0, name
            found[name.partition(":")[0]] = parts
    assert found["dpo"]["parameters"] == pytest.approx(held, rel=1e-3)
    assert found["dpo"]["moments"] == pytest.approx(held, rel=1e-3)  # RMSprop: one
    assert found["sample"]["cache"] == 2 * 2 * 4 * 64 * 4 * 64 * 2  # k, v; layers, heads; bf16
    layer = 4 * 1024**2 + 2 * 1024 * 4096 + 2 * 512 * 1024
    assert found["rank"]["parameters"] == pytest.approx(4 * (2 * layer + 512 * 1024), rel=1e-2)


@pytest.mark.heavy
def test_a_small_models_programs_are_compiled_for_a_tpu():
    pytest.importorskip("libtpu", reason="pip install libtpu: it compiles without a TPU")
    from model.config import from_hf

    plan = plan_of(topology="v5e:2x2")
    plan = dataclasses.replace(plan, decoder=arithmetic.DecoderCost(from_hf(SMALL)))
    work = fit.compiler_work(plan)
    del work["rank"]
    found = programs.compiled(plan.on, work)
    assert [m.program.partition(":")[0] for m in found] == ["sample", "sample", "dpo", "dpo"]
    held = 4 * plan.decoder.parameters / 4  # fp32, over four chips
    for memory in found:
        assert fit.fits(memory, plan.on) and memory.parts["activations"] >= 0
    for memory in found[2:]:
        for part in ("parameters", "gradients", "moments"):  # RMSprop: one moment
            assert memory.parts[part] == pytest.approx(held, rel=0.02)
    assert found[0].parts["cache"] == pytest.approx(plan.sampling().memory()["cache"])
