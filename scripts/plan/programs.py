"""The stages' real programs, compiled by a TPU's real compiler for a slice that is not there.

    echo JSON | python -m scripts.plan.programs      a line of JSON for each program

It runs in a process of its own: libtpu disturbs other work of jax, and a compilation of the full
size leaves gigabytes behind. Nothing is computed and no weight exists: arrays are shapes alone.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
from etils import epy

from scripts.plan.slices import Slice
from sharding.errors import UserError, first_line

with epy.lazy_imports():  # loaded in the compiler's process alone
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from model import config as configs
    from model import decoder, generate, kv_cache, losses, packing, train, weights
    from model.rankers import deberta, deberta_tpu
    from sharding import mesh as meshes
    from sharding import table

INSTALL = (
    "package libtpu, the TPU compiler, is not installed: pip install libtpu (0.0.42.1 goes with "
    "jax 0.10.2), or pass --arithmetic to go without it"
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a chip while one program runs."""

    program: str
    parts: dict[str, float]  # parameters, moments, gradients, cache, activations
    refused: str = ""  # what the compiler says where the program does not fit

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def compiled(on: Slice, work: dict) -> list[Memory]:
    """What the compiler says. work: {"sample": …, "rank": …, "dpo": …}, the keyword arguments of
    the functions below; a stage that is left out is not compiled."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(INSTALL)
    # No device is looked for, no cloud asked which it is, and no other process kept off a TPU.
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    environment = {**os.environ, **settings}
    asked = json.dumps({"topology": str(on), "size": on.size, "work": work})
    command = [sys.executable, "-m", "scripts.plan.programs"]
    found = []
    with tempfile.TemporaryFile("w+") as log:  # libtpu complains of the TPU that is not there
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        process.stdin.write(asked)
        process.stdin.close()
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            told = json.loads(line)
            if "error" in told:
                raise UserError(f"{on}: {told['error']}")
            seconds = told.pop("seconds")
            found.append(Memory(**told))
            print(f"  {told['program']}: compiled in {seconds:.0f} s", file=sys.stderr)
        if process.wait():
            log.seek(0)
            raise RuntimeError(f"the compiler's process ended: {log.read()[-3000:]}")
    return found


# ---------------------------------------------------------------- in the compiler's process


def devices(topology: str):
    """The devices of a TPU slice that is not there: v5p:2x2x1. One chip is taken out of four."""
    name, _, shape = topology.partition(":")
    sides = shape.split("x")
    one = all(side == "1" for side in sides)
    if one:
        sides[:2] = ["2", "2"]
    found = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{'x'.join(sides)}")
    return found.devices[:1] if one else found.devices


def parts(program, **known: int) -> dict[str, int]:
    """What it takes on one device while it runs: the parts that are known, and what is left of
    its arguments, outputs and temporaries, as activations."""
    memory = program.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
    return {**known, "activations": whole - sum(known.values())}


def sampling(config, mesh, slots: int, length: int, prefill: int, dtype: str, flags: dict):
    """(name, compiled program, its parts) of a decode step and of a row of prompts of `prefill`
    tokens; length: positions of the cache; flags: of generate.Sampling."""
    dtype, drawing, whole = jnp.dtype(dtype), generate.Sampling(**flags), meshes.replicated(mesh)
    params = kv_cache.unstacked(decoder.abstract(config, mesh, dtype))
    state = jax.eval_shape(partial(generate._empty, config, slots, length, drawing, dtype))
    state = jax.tree.map(lambda x: x.update(sharding=whole), state)
    state |= {"cache": kv_cache.abstract_cache(config, mesh, slots, length, dtype)}
    sizes = {
        "parameters": table.bytes_per_device(params),
        "cache": table.bytes_per_device(state["cache"]),
    }
    at = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    with jax.set_mesh(mesh):
        advance = partial(generate._advance, config=config, sampling=drawing, dtype=dtype)
        decode = jax.jit(advance, donate_argnums=1).lower(params, state, at).compile()
        yield f"sample: a step of {slots} slots", decode, parts(decode, **sizes)
        names = ("tokens", "positions", "prompts")
        row = {n: jax.ShapeDtypeStruct((1, prefill), np.int32, sharding=whole) for n in names}
        prompts = jax.jit(partial(generate._prefill, config=config, dtype=dtype))
        prompts = prompts.lower(params, row=row).compile()
        # The program has no use for the vocabulary's matrix, so the compiler leaves it out.
        used = {name: x for name, x in params.items() if name != "unembed"}
        beside = parts(prompts, parameters=table.bytes_per_device(used)) | sizes
        yield f"sample: {prefill} tokens of prompts", prompts, beside


def training(
    config,
    mesh,
    pairs: int,
    prompt: int,
    length: int,
    recipe: dict,
    dtype: str,
    remat: str,
    several: bool,
):
    """(name, compiled program, its parts) of one micro-batch of so many pairs, each of a prompt
    and two responses up to `length`, and of the update. recipe: the fields of train.Optimization;
    several: whether a step has more micro-batches, whose gradients are summed."""
    optimization = train.Optimization(**recipe)
    pair = packing.Sequence([3] * prompt, [[4] * (length - prompt), [5] * (length - prompt)])
    params, whole = decoder.abstract(config, mesh), meshes.replicated(mesh)
    batch = packing.pack([pair] * pairs, meshes.batch_shards(mesh))
    held = train.arrays_held(optimization, params, batch)
    state, batch = held["optimizer state"], held["batch"]
    names = (
        "ref_chosen",
        "ref_rejected",
        "chosen_tokens",
        "rejected_tokens",
        "win_probability",
        "weights",
    )
    sides = {n: jax.ShapeDtypeStruct((pairs,), np.float32, sharding=whole) for n in names}
    scalar = jax.ShapeDtypeStruct((), np.float32, sharding=whole)
    # Not under the mesh: optax makes a counter, and these devices run nothing.
    loss = partial(
        losses.pair_loss, loss=losses.Loss(), config=config, dtype=jnp.dtype(dtype), remat=remat
    )
    trainer = train.Trainer(loss, optimization, 100, params)
    known = {
        "parameters": table.bytes_per_device(params),
        "gradients": table.bytes_per_device(params),
    }
    moments = table.bytes_per_device(state)
    with jax.set_mesh(mesh):
        before = params if several else None
        accumulate = trainer.accumulate.lower(params, before, batch | sides, scalar).compile()
        beside = parts(accumulate, **known) | {"moments": moments}
        yield f"dpo: gradients of {pairs} pairs", accumulate, beside
        apply = trainer.apply.lower(params, state, params, scalar).compile()
        yield "dpo: update", apply, parts(apply, **known, moments=moments)


def pairrm_layer(config, device, dtype: str, rows: int, length: int):
    """(name, compiled program, its parts) of a layer over so many comparisons, as deberta.py
    calls it for one layer after the other, the other layers' weights beside it."""
    dtype, whole = jnp.dtype(dtype), meshes.replicated(meshes.make_mesh(1, 1, 1, devices=[device]))

    def placed(shape, kind=dtype):
        return jax.ShapeDtypeStruct(shape, kind, sharding=whole)

    params: dict = {"layers": [{} for _ in range(config.num_hidden_layers)]}
    for slot in weights.table_slots(deberta.TABLE, config.num_hidden_layers).values():
        parent = params
        for step in slot.path[:-1]:
            parent = parent[step]
        shape = tuple(config.axis_sizes[letter] for letter in slot.our_axes)
        parent[slot.path[-1]] = placed(shape, jnp.float32)
    ready = jax.eval_shape(lambda p: deberta.prepare(p, config, dtype), params)
    ready = jax.tree.map(lambda x: placed(x.shape), ready)
    x_btd = placed((rows, length, config.hidden_size))
    real_bt = placed((rows, length), jnp.bool_)
    kernel = deberta_tpu.runs_on(device.device_kind)
    layer = deberta.layer.lower(ready["layers"][0], config, x_btd, real_bt, kernel=kernel).compile()
    found = parts(layer, parameters=table.bytes_per_device(ready["layers"][0]))
    found["parameters"] = table.bytes_per_device(ready)
    yield f"rank: a layer over {rows} comparisons of {length} tokens", layer, found


def _stage(stage: str, given: dict, there) -> Iterator[tuple]:
    config = given.pop("config")
    if stage == "rank":
        return pairrm_layer(deberta.DebertaConfig(**config), there[0], **given)
    config["eos_token_ids"] = tuple(config["eos_token_ids"])
    mesh = meshes.make_mesh(*given.pop("mesh"), devices=there)
    build = {"sample": sampling, "dpo": training}[stage]
    return build(configs.DecoderConfig(**config), mesh, **given)


def main() -> None:
    asked = json.load(sys.stdin)
    begun = time.monotonic()

    def tell(**what):
        nonlocal begun
        seconds, begun = time.monotonic() - begun, time.monotonic()
        print(json.dumps({**what, "seconds": seconds}), flush=True)

    try:
        there = devices(asked["topology"])
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        return tell(error=f"no such slice for the compiler: {first_line(error)[:200]}")
    if len(there) != asked["size"]:
        return tell(error=f"the compiler knows {len(there)} devices of it, not {asked['size']}")
    for stage, given in asked["work"].items():
        try:
            for name, _, found in _stage(stage, given, there):
                tell(program=name, parts=found)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            tell(program=f"{stage}: its program", parts={}, refused=first_line(error)[:200])


if __name__ == "__main__":
    main()
