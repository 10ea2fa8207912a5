"""What a TPU compiler says of the full-size programs, ahead of time and without a TPU.

Needs `pip install libtpu` (0.0.42.1 goes with jax 0.10.2), in an environment of its own: beside
plain jax it disturbs the other tests.
"""

import pytest

from scripts.bench.shapes import MISTRAL_7B
from scripts.plan import programs
from sharding.mesh import make_mesh

GIB = 2**30


def topology(name: str, monkeypatch):
    """The devices of a TPU slice that is not there."""
    pytest.importorskip("libtpu", reason="pip install libtpu: it compiles without a TPU")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other compilations may run beside it
    return programs.devices(name)


def bytes_a_chip(compiled, what: str) -> float:
    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(
        f"{what}: arguments {arguments / GIB:.2f}, temporary {temporary / GIB:.2f}, "
        f"new output {new / GIB:.2f} GiB a chip"
    )
    return (arguments + temporary + new) / GIB


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name,shape,memory", [("v5e:2x4", (1, 1, 8), 16), ("v5p:2x2x1", (1, 1, 4), 95)]
)
def test_sampling_mistral_7b_fits_64_slots_of_2560_positions(name, shape, memory, monkeypatch):
    mesh = make_mesh(*shape, devices=topology(name, monkeypatch))
    made = programs.sampling(MISTRAL_7B, mesh, 64, 2560, 512, "bfloat16", {"max_new_tokens": 2048})
    decode, prefill = (program for _, program, _ in made)
    assert bytes_a_chip(decode, f"{name}, decode") < 0.9 * memory
    assert decode.memory_analysis().temp_size_in_bytes < GIB  # the cache (2.5, 5) is there once
    assert bytes_a_chip(prefill, f"{name}, prefill of 512 tokens") < 0.9 * memory


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name,pairs_a_chip,remat,memory", [("v5p:2x2x1", 4, "full", 60), ("v5e:4x4", 1, "full", 14)]
)
def test_a_dpo_step_of_mistral_7b_fits(name, pairs_a_chip, remat, memory, monkeypatch):
    """Pairs at --max-length 1024: a prompt of 512 tokens, two responses of 512."""
    mesh = make_mesh(1, -1, 1, devices=topology(name, monkeypatch))
    recipe = {
        "learning_rate": 5e-7,
        "schedule": "linear",
        "warmup_ratio": 0.1,
        "optimizer": "adamw",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    # A second micro-batch, which finds the gradients of the first.
    made = programs.training(
        MISTRAL_7B,
        mesh,
        pairs_a_chip * mesh.size,
        512,
        1024,
        recipe,
        "bfloat16",
        remat,
        several=True,
    )
    for what, program, parts in made:
        bytes_a_chip(program, f"{name}, {pairs_a_chip} pairs a chip, {what}")
        print({part: f"{size / GIB:.2f}" for part, size in parts.items()})
        assert sum(parts.values()) / GIB < memory
