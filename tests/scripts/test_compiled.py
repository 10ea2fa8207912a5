"""What accelerators' compilers make of the programs: nothing runs as a slow loop, sums that cross
devices are fp32, and the cache lies in memory once."""

import dataclasses
import re

import pytest

from scripts.bench.shapes import MISTRAL_7B
from scripts.plan import __main__ as command
from scripts.plan import compile as compiler

pytestmark = pytest.mark.heavy
LAYERS = 2
SMALL = dataclasses.replace(
    MISTRAL_7B,
    hidden_size=512,
    intermediate_size=1024,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
)


def compiled(machine: str, name: str, config=MISTRAL_7B, **flags) -> dict:
    """What there is to say of a program of the published recipe, with a model of two layers."""
    config = dataclasses.replace(config, num_hidden_layers=LAYERS)
    plan = command.make(command.Args("snorkel-mistral-7b", machine)).changed("dpo", **flags)
    plan = dataclasses.replace(plan, config=config)
    if not compiler.installed(plan.on.compiler):
        pytest.skip(f"no compiler: bash scripts/plan/setup.sh {plan.on.compiler}")
    programs = [each for each in plan.programs() if each["name"] == name]
    (told,) = compiler.described(plan.on, programs, compiles=True)
    return told


def sources(text: str, operation: str) -> list[str]:
    """Where in the program each of these operations comes from: its named scopes, if any."""
    lines = [line for line in text.splitlines() if f" {operation}(" in line]
    names = [re.search(r'op_name="([^"]*)"', line) for line in lines]
    return [name[1] if name else "" for name in names]


@pytest.mark.parametrize("machine", ["v5e-16", "v5p-8", "v6e-8"])
def test_a_decode_step_on_a_tpu_has_no_loop_over_the_slots(machine):
    text = compiled(machine, "sample: a usual step")["text"]
    loops = sources(text, "while")
    (steps,) = [name for name in loops if name.endswith("advance)/while")]
    within = [name for name in loops if name != steps]
    assert [name for name in within if "/draw/" not in name] == []
    # A step reads each layer's cache by the kernel, and writes it once per call, behind the steps.
    kernels = sources(text, "custom-call")
    assert sum(f"{steps}/body" in name and "attention" in name for name in kernels) == LAYERS


@pytest.mark.parametrize("machine", ["v5e-16", "v5p-8"])
def test_a_tpu_copies_prompts_to_the_slots_without_a_second_cache(machine):
    parts = compiled(machine, "sample: starts")["parts"]
    one_layers_keys = parts["cache"] / LAYERS / 2
    assert parts["temporary"] < one_layers_keys < 2**30


def test_a_tpu_sums_gradients_in_fp32_and_the_vocabularys_once_per_chunk_of_1024_tokens():
    flags = {"micro_batch_size": 8, "mesh": (1, -1, 1)}  # two pairs a chip, two chunks of answers
    text = compiled("v5e:2x2", "dpo: gradients", SMALL, **flags)["text"]
    travels = []  # (kind of exchange, what is exchanged, where in the program)
    for line in text.splitlines():
        if exchange := compiler.COLLECTIVE.search(line):
            name = re.search(r'op_name="([^"]*)"', line)
            travels.append((exchange[2], exchange[1], name[1] if name else ""))
    sums = [arrays for kind, arrays, _ in travels if kind in ("all-reduce", "reduce-scatter")]
    assert [arrays for arrays in sums if "bf16" in arrays] == []
    # The layers' weights: within their products, a share of the sum goes from chip to chip.
    weights = {}
    for kind, arrays, name in travels:
        product = re.search(r"->(dnh|dkh|ed|df|fd)/dot_general$", name)
        if product and kind != "all-gather":
            weights.setdefault(product[1], set()).update(re.findall(r"(\w+)\[\d", arrays))
    assert weights == {axes: {"f32"} for axes in ("dnh", "dkh", "ed", "df", "fd")}
    # The vocabulary's: chunks of 1,024 tokens, one sum in the loop over them.
    assert "f32[1,1024,32000]" in text and "[1,256,32000]" not in text
    assert sum(arrays.startswith("f32[512,32000]") for arrays in sums) == 1
