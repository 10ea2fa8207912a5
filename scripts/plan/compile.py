"""The stages' real programs, compiled for devices that are not there.

`described` runs this file in a process and an environment of its own (scripts/plan/setup.sh): a
compiler for other devices disturbs JAX's other work, and a large program leaves gigabytes behind.
Nothing is computed and no weight exists: arrays are shapes alone.
"""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from model import generate, kv_cache, logprobs, losses, packing, placement, train, weights
from model.config import DecoderConfig
from model.rankers import deberta, deberta_tpu
from scripts.plan import count, slices
from scripts.plan.slices import Slice
from sharding import mesh as meshes
from sharding import table
from sharding.chips import CHIPS
from sharding.errors import UserError, first_line

HERE = Path(__file__).parent
COMPILERS = HERE.parents[1] / ".compilers"
MODULES = {"cpu": "jax", "tpu": "libtpu", "cuda": "jax_cuda13_plugin"}  # a compiler is part of it
VARIABLES = {  # no device is looked for, no cloud asked which it is, no other compilation shut out
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def installed(kind: str) -> bool:
    """Whether a compiler for these devices is, here or by scripts/plan/setup.sh."""
    return (COMPILERS / kind).is_dir() or importlib.util.find_spec(MODULES[kind]) is not None


def described(on: Slice, programs: list[dict], compiles: bool) -> list[dict]:
    """What `main` says of each program."""
    path = [str(COMPILERS / on.compiler), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.plan.compile", str(on) if compiles else ""],
        input=json.dumps(programs),
        env={**os.environ, **VARIABLES, "PYTHONPATH": os.pathsep.join(path)},
        cwd=HERE.parents[1],
        capture_output=True,  # libtpu complains of the TPU that is not there
        text=True,
    )
    if done.returncode == 2:
        raise UserError(f"{on}: {done.stdout.strip()}")
    if done.returncode:
        raise RuntimeError(f"the compiler's process ended: {done.stderr[-3000:]}")
    return list(map(json.loads, done.stdout.splitlines()))


# ---------------------------------------------------------------- in the compiler's process


@dataclasses.dataclass
class Program:
    """A jitted function, and what lies on the devices while it runs."""

    call: Callable
    args: tuple
    inside: dict  # title → shapes that it takes or gives
    beside: dict = dataclasses.field(default_factory=dict)  # title → shapes that lie there too
    devices: int = 1  # that share its products
    trips: int = 1  # how often a loop runs whose end depends on the data

    def traced(self):
        """(the traced function, {"flops", "bytes"} of one device)."""
        traced = self.call.trace(*self.args)
        flops = count.operations(traced.jaxpr.jaxpr, self.trips) / self.devices
        inside = sum(map(table.bytes_per_device, self.inside.values()))
        return traced, {"flops": flops, "bytes": inside}

    def describe(self, compiles: bool, size: int) -> dict:
        """{"parts": title → bytes, "flops", "bytes", "cycles", "exchange"} of one device, and
        "refused" if it is too large for the compiler. Without a compiler: no temporaries, cycles
        or exchange. size: of the mesh."""
        parts = Counter()
        for title, arrays in (*self.inside.items(), *self.beside.items()):
            parts[title] += table.bytes_per_device(arrays)
        traced, work = self.traced()
        told = {"parts": parts, "cycles": 0.0, "exchange": 0.0, **work}
        try:
            compiled = traced.lower().compile() if compiles else None
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return told | {"refused": first_line(error)[:200]}
        if compiled:
            memory = compiled.memory_analysis()
            new = memory.output_size_in_bytes - memory.alias_size_in_bytes
            whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
            parts["temporary"] = max(0, whole - work["bytes"])
            told |= count.compiled_work(compiled.as_text(), size, self.trips)
        return told


def _whole(mesh, dimensions, dtype=np.int32):
    """The shape of an array that every device holds whole."""
    return jax.ShapeDtypeStruct(dimensions, dtype, sharding=meshes.replicated(mesh))


# Each of these gives a Program. a: the stage's flags, and what `Plan.programs` adds to them.


def _of(kind: type, a):
    """A settings' class with those of its fields that are flags."""
    return kind(**{f.name: getattr(a, f.name) for f in dataclasses.fields(kind)})


def _sampler(config, mesh, a) -> tuple[dict, list]:
    params = placement.parameters(config, mesh, jnp.dtype(a.dtype))
    cache = kv_cache.abstract_cache(config, mesh, a.slots, a.length, jnp.dtype(a.dtype))
    return placement.unstacked(params), cache


def decode(config, mesh, a) -> Program:
    """A step of all slots."""
    (params, cache), dtype = _sampler(config, mesh, a), jnp.dtype(a.dtype)
    a.stop_strings, drawing = (), _of(generate.Sampling, a)
    state = jax.eval_shape(partial(generate._empty, config, a.slots, a.length, drawing, dtype))
    state = jax.tree.map(lambda x: _whole(mesh, x.shape, x.dtype), state) | {"cache": cache}
    call = partial(generate._advance, config=config, sampling=drawing, dtype=dtype)
    args = (params, state, _whole(mesh, ()))
    inside = {"parameters": params, "cache": cache}
    return Program(jax.jit(call, donate_argnums=1), args, inside, devices=mesh.size)


def prefill(config, mesh, a) -> Program:
    """A row of prompts, beside the slots' cache."""
    params, cache = _sampler(config, mesh, a)
    names = ("tokens", "positions", "prompts")
    # The program has no use for the vocabulary's matrix, so the compiler leaves it out.
    unused = {name: x for name, x in params.items() if name == "unembed"}
    used = {name: x for name, x in params.items() if name != "unembed"}
    return Program(
        jax.jit(lambda params, row: generate._prefill(params, config, row, jnp.dtype(a.dtype))),
        (params, {name: _whole(mesh, (1, a.tokens)) for name in names}),
        {"parameters": used},
        {"parameters": unused, "cache": cache},
        devices=mesh.shape["tensor"],  # one row: on every part of the batch
    )


def gradients(config, mesh, a) -> Program:
    """Of a micro-batch of alike pairs; where there are several, they are added to another one's."""
    params, size = placement.parameters(config, mesh), a.micro_batch_size
    answer = a.max_length - a.max_prompt_length
    pair = packing.Sequence([3] * a.max_prompt_length, [[4] * answer, [5] * answer])
    packed = packing.pack([pair] * size, meshes.batch_shards(mesh))
    batch = meshes.abstract(packed, meshes.batch_shardings(mesh, packed))
    sides = [name for name in losses.Pairs._fields if not name.startswith("pi_")]
    batch |= {name: _whole(mesh, (size,), np.float32) for name in (*sides, "weights")}
    how = {"config": config, "dtype": jnp.dtype(a.dtype), "remat": a.remat}
    loss = partial(losses.pair_loss, loss=losses.Loss(), **how)
    trainer = train.Trainer(loss, _of(train.Optimization, a), 100, params)
    before = params if a.batch_size > size else None
    # The chunks of the responses in model/logprobs.py.
    rows, t = packed["targets"].shape
    step = min(t, max(1, logprobs.CHUNK * meshes.batch_shards(mesh) // rows))
    chunks = -(-int((packed["owners"] >= 0).sum(axis=1).max()) // step)
    args = (params, before, batch, _whole(mesh, (), np.float32))
    inside = {"parameters": params, "gradients": params}
    beside = {"moments": trainer.optimizer_state}
    return Program(trainer.accumulate, args, inside, beside, mesh.size, chunks)


def layer(config, mesh, a) -> Program:
    """A layer of PairRM over so many comparisons, the other layers' weights beside it."""
    kernel = a.chip in CHIPS and any(map(deberta_tpu.runs_on, CHIPS[a.chip].kinds))
    dtype, params = jnp.dtype(a.dtype), {"layers": [{} for _ in range(config.num_hidden_layers)]}
    for slot in weights.table_slots(deberta.TABLE, config.num_hidden_layers).values():
        parent = params
        for step in slot.path[:-1]:
            parent = parent[step]
        dimensions = tuple(config.axis_sizes[letter] for letter in slot.our_axes)
        parent[slot.path[-1]] = jax.ShapeDtypeStruct(dimensions, jnp.float32)
    params = jax.eval_shape(lambda p: deberta.prepare(p, config, dtype), params)
    params = jax.tree.map(lambda x: _whole(mesh, x.shape, dtype), params)
    first, *others = params.pop("layers")
    x_btd = _whole(mesh, (a.rows, a.length, config.hidden_size), dtype)
    real_bt = _whole(mesh, (a.rows, a.length), jnp.bool_)
    args = (first, config, x_btd, real_bt, None, kernel)
    return Program(deberta.layer, args, {"parameters": first}, {"parameters": [params, others]})


BUILDERS = {each.__name__: each for each in (decode, prefill, gradients, layer)}


def main(topology: str) -> None:
    """Print what there is to say of each program that is asked for, a line of JSON each."""
    chips = []
    if topology:
        try:
            chips = _devices(slices.parse(topology) if topology != "cpu" else None)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            print(f"its compiler knows no such machine: {first_line(error)[:200]}")
            sys.exit(2)
    for program in json.load(sys.stdin):
        sizes, build = tuple(program["mesh"]), BUILDERS[program["build"]]
        kind = deberta.DebertaConfig if build is layer else DecoderConfig
        config = program["config"].items()
        config = kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in config})
        # Without devices a mesh is enough to trace a program, and to say what lies where.
        mesh, use = meshes.abstract_mesh(sizes), jax.sharding.use_abstract_mesh
        if chips:
            mesh = meshes.make_mesh(*sizes, devices=chips[: math.prod(sizes)])
            use = jax.set_mesh
        # Built outside the mesh: optax makes a counter, and these devices run nothing.
        longest, usual = (
            build(config, mesh, SimpleNamespace(**program["given"] | more))
            for more in ({}, program["usual"])
        )
        with use(mesh):
            told = longest.describe(bool(chips), mesh.size)
            _, work = usual.traced()
        # Along fsdp it is the weights that travel, as many whatever the lengths.
        share = work["flops"] / told["flops"]
        exchange = told["exchange"] * (share if mesh.shape["fsdp"] == 1 else 1)
        work |= {"cycles": told["cycles"] * share, "exchange": exchange}
        print(json.dumps({"name": program["name"], "usual": work, **told}), flush=True)


def _devices(on: Slice | None) -> list:
    if on is None:
        return jax.devices()[:1]
    if on.compiler == "cuda":
        target = (HERE / f"{on.chip.name}.target_config.txtpb").read_text()
        shape = f"{on.hosts}x1x{on.size // on.hosts}"
        more = {"target_config": target, "topology": shape}
        return topologies.get_topology_desc(platform="cuda", **more).devices
    # One chip is taken out of four.
    name = str(on).replace(":1x1", ":2x2") if on.size == 1 else str(on)
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[: on.size]


if __name__ == "__main__":
    main(sys.argv[1])
