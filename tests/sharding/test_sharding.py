"""Where arrays lie: on eight simulated devices, in the table, and on the mesh that is chosen."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh

from model import decoder, logprobs, slot_state, train
from model.config import DecoderConfig
from model.packing import Sequence, pack
from model.precision import precision_of
from scripts.bench.shapes import MISTRAL_7B
from sharding import mesh as meshes
from sharding import table
from sharding.errors import UserError
from sharding.mesh import MESH_AXES, batch_shards, decoding_sizes, make_mesh, training_sizes
from tests import tiny


@pytest.mark.parametrize(
    "meshes",
    [
        pytest.param(["2,2,2"], id="every axis"),
        pytest.param(["1,8,1", "1,4,2", "8,1,1", "1,1,8"], id="others", marks=pytest.mark.heavy),
    ],
)
def test_everything_lies_where_it_should_on_eight_devices(meshes):
    found = subprocess.run(
        [sys.executable, "-m", "tests.sharding.eight_devices", *meshes],
        env=os.environ | {"XLA_FLAGS": tiny.xla_flags(8)},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(found.stdout)
    assert found.returncode == 0
    assert "0 wrong" in found.stdout


def test_the_table_of_a_mistral_7b_training_on_four_chips():
    mesh = AbstractMesh((1, 4, 1), MESH_AXES)
    optimization = train.Optimization(5e-7, "linear", 0.1, "adamw", 0.0, 1.0)
    batch = pack([Sequence([3] * 8, [[4] * 8, [5] * 8])] * 4, batch_shards(mesh))
    sections = train.arrays_held(optimization, decoder.abstract(MISTRAL_7B, mesh), batch)
    count, norms = 7_241_732_096, 65 * 4096
    a_device = 4 * ((count - norms) // 4 + norms)
    for title, times, counters in (
        ("parameters", 1, 0),
        ("gradients", 1, 0),
        ("optimizer state", 2, 8),
    ):
        assert table.bytes_per_device(sections[title]) == times * a_device + counters
    found = {row.name: row for row in table.rows(sections["parameters"])}
    assert found["layers/down"].bytes_per_device == 32 * 14336 * 1024 * 4
    assert (found["layers/down"].copies, found["final_norm"].copies) == (1, 4)
    lines = [line.split("  ") for line in table.table(mesh, sections).splitlines()]
    words = {tuple(word.strip() for word in line if word.strip()) for line in lines}
    assert ("layers/q", "32×4096×32×128", "float32", "–, fsdp, –, –", "1", "536.9 MB") in words
    assert ("mu/layers/q", "32×4096×32×128", "float32", "–, fsdp, –, –", "1", "536.9 MB") in words
    assert ("tokens", "4×32", "int32", "fsdp, –", "1", "128 B") in words
    assert ("2 × count", "–", "int32", "–", "4", "8 B") in words


def test_the_table_of_a_sampling_counts_the_cache_and_its_copies():
    config = tiny.config(num_attention_heads=6, num_key_value_heads=3)
    mesh = AbstractMesh((1, 2, 2), MESH_AXES)  # 3 key heads over 2 devices stay whole
    sections = slot_state.arrays_held(
        config, mesh, slots=4, length=64, precision=precision_of("bfloat16", "tpu")
    )
    (keys, values) = table.rows(sections["cache"])
    for row in (keys, values):
        assert (row.count, row.copies, row.dtype) == (2, 2, "bfloat16")
        assert row.bytes == 2 * row.bytes_per_device == 2 * 4 * 3 * 8 * 64 * 2


@pytest.mark.parametrize(
    "devices,config,training,decoding",
    [
        (1, MISTRAL_7B, (1, 1, 1), (1, 1, 1)),
        (8, MISTRAL_7B, (1, 8, 1), (1, 1, 8)),
        (12, MISTRAL_7B, (3, 4, 1), (3, 1, 4)),
        (64, MISTRAL_7B, (1, 64, 1), (8, 1, 8)),
        (4, tiny.config(), (1, 4, 1), (2, 1, 2)),
        (4, tiny.config(num_attention_heads=6, num_key_value_heads=3), (1, 4, 1), (4, 1, 1)),
    ],
)
def test_the_mesh_that_is_chosen(devices, config: DecoderConfig, training, decoding):
    assert training_sizes(devices, config) == training
    assert decoding_sizes(devices, config) == decoding
    assert math.prod(training) == math.prod(decoding) == devices


def test_the_vocabularys_gradient_is_summed_once_per_1024_tokens_of_a_device_off_cpu():
    """On several devices each chunk of tokens ends with a sum across them."""
    chips = AbstractMesh((1, 4, 1), MESH_AXES)
    assert logprobs.chunk_length(4, 8192, chips) == 1024
    assert logprobs.chunk_length(8, 8192, chips) == 512  # of two rows per device
    assert logprobs.chunk_length(4, 8192, make_mesh(1, 4, 1).abstract_mesh) == logprobs.CHUNK


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU as far as placing a mesh looks at it: one core, one of four in its host."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    slice_index: int = 0

    @property
    def process_index(self) -> int:
        return self.id // 4


@pytest.mark.parametrize(
    "kind,torus,sizes",
    [
        ("TPU v6 lite", (4, 4, 1), (2, 1, 8)),
        ("TPU v5", (4, 4, 4), (8, 1, 8)),
        ("TPU v5 lite", (4, 4, 1), (2, 1, 8)),
    ],
)
def test_a_mesh_may_split_an_axis_of_the_chips_torus(monkeypatch, kind, torus, sizes):
    places = itertools.product(*map(range, torus))
    chips = [Chip(i, place, kind) for i, place in enumerate(places)]
    monkeypatch.setattr(meshes, "Mesh", lambda placed, *_, **__: placed)
    placed = make_mesh(*sizes, devices=chips)
    assert placed.shape == sizes
    assert {chip.id for chip in placed.flat} == set(range(len(chips)))


def test_numbers_of_64_bits_are_refused():
    with jax.enable_x64(True), pytest.raises(UserError, match="jax_enable_x64 is on"):
        make_mesh(1, -1, 1)
