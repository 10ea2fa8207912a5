"""What a TPU compiler says of the full-size programs, ahead of time and without a TPU.

Needs `pip install libtpu` (0.0.42.1 goes with jax 0.10.2), in an environment of its own: beside
plain jax it disturbs the other tests.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import generate, losses, placement, train
from model.config import MistralConfig
from model.packing import Sequence, pack
from sharding.mesh import abstract, make_mesh, replicated
from sharding.table import bytes_a_device

MISTRAL_7B = MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, rope_theta=1e6,
    max_position_embeddings=32768,
)  # fmt: skip
GIB = 2**30


def topology(name: str, monkeypatch):
    """The devices of a TPU slice that is not there."""
    pytest.importorskip("libtpu", reason="pip install libtpu: it compiles without a TPU")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other compilations may run beside it
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def bytes_a_chip(compiled, what: str) -> float:
    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(f"{what}: arguments {arguments / GIB:.2f}, temporary {temporary / GIB:.2f}, "
          f"new output {new / GIB:.2f} GiB a chip")  # fmt: skip
    return (arguments + temporary + new) / GIB


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name,shape,memory", [("v5e:2x4", (1, 1, 8), 16), ("v5p:2x2x1", (1, 1, 4), 95)]
)
def test_sampling_mistral_7b_fits_64_slots_of_2560_positions(name, shape, memory, monkeypatch):
    config, slots, length = MISTRAL_7B, 64, 2560
    mesh = make_mesh(*shape, devices=topology(name, monkeypatch))
    sampling = generate.Sampling(max_new_tokens=2048)
    whole = replicated(mesh)
    params = placement.unstacked(placement.parameters(config, mesh, jnp.bfloat16))
    state = jax.eval_shape(partial(generate._empty, config, slots, length, sampling, jnp.bfloat16))
    state = abstract(state, jax.tree.map(lambda _: whole, state))
    state |= {"cache": placement.cache(config, mesh, slots, length, jnp.bfloat16)}
    at = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    with jax.set_mesh(mesh):
        advance = partial(generate._advance, config=config, sampling=sampling, dtype=jnp.bfloat16)
        decode = jax.jit(advance, donate_argnums=1).lower(params, state, at).compile()
        names = ("tokens", "positions", "prompts")
        row = {n: jax.ShapeDtypeStruct((1, 512), np.int32, sharding=whole) for n in names}
        prefill = jax.jit(partial(generate._prefill, config=config, dtype=jnp.bfloat16))
        prefill = prefill.lower(params, row=row).compile()
    assert bytes_a_chip(decode, f"{name}, decode") < 0.9 * memory
    assert decode.memory_analysis().temp_size_in_bytes < GIB  # the cache (2.5, 5) is there once
    assert bytes_a_chip(prefill, f"{name}, prefill of 512 tokens") < 0.9 * memory


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name,pairs_a_chip,remat,memory", [("v5p:2x2x1", 4, "full", 60), ("v5e:4x4", 1, "full", 14)]
)
def test_a_dpo_step_of_mistral_7b_fits(name, pairs_a_chip, remat, memory, monkeypatch):
    """Pairs at --max-length 1024: a prompt of 512 tokens, two responses of 512."""
    config = MISTRAL_7B
    mesh = make_mesh(1, -1, 1, devices=topology(name, monkeypatch))
    pairs = pairs_a_chip * mesh.size
    recipe = train.Recipe(losses.Loss(), 5e-7, "linear", 0.1, "adamw", 0.0, 1.0)
    pair = Sequence([3] * 512, [[4] * 512, [5] * 512])
    lies = placement.training(config, mesh, recipe, pack([pair] * pairs, mesh.size))
    params, state, batch = lies["parameters"], lies["optimizer state"], lies["batch"]
    shardings = jax.tree.map(lambda x: x.sharding, params)
    names = ("ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens", "win_probability",
             "weights")  # fmt: skip
    whole = replicated(mesh)
    sides = {n: jax.ShapeDtypeStruct((pairs,), np.float32, sharding=whole) for n in names}
    scalar = jax.ShapeDtypeStruct((), np.float32, sharding=whole)
    # Not under the mesh: optax makes a counter, and these devices run nothing.
    trainer = train.Trainer(config, recipe, 100, shardings, whole, jnp.bfloat16, remat)
    with jax.set_mesh(mesh):
        # A second micro-batch, which finds the gradients of the first.
        accumulate = trainer.accumulate.lower(params, params, batch, sides, scalar).compile()
        moments = bytes_a_device(state) / GIB
        used = bytes_a_chip(accumulate, f"{name}, {pairs_a_chip} pairs a chip, gradients")
        print(f"moments beside it: {moments:.2f} GiB a chip")
        apply = trainer.apply.lower(params, state, params, scalar).compile()
    assert bytes_a_chip(apply, f"{name}, update") < memory
    assert used + moments < memory
