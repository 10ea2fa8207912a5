"""The stages' real programs, compiled for devices that are not there.

    echo '{"devices": {…}, "programs": [{…}, …]}' | python -m scripts.plan.compile

prints a line of JSON for each program; scripts/plan/schedule.py says what is asked. `described`
runs this file in a process and an environment of its own (scripts/plan/setup.sh): a compiler for
other devices disturbs JAX's other work, and a large program leaves gigabytes behind. Nothing is
computed and no weight exists: arrays are shapes alone.
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

import numpy as np
from etils import epy

from sharding.chips import CHIPS
from sharding.errors import UserError, first_line

with epy.lazy_imports():  # loaded in the compiler's process alone
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from model import config as configs
    from model import generate, kv_cache, logprobs, losses, packing, placement, train, weights
    from model.rankers import deberta, deberta_tpu
    from scripts.plan import count
    from sharding import mesh as meshes
    from sharding import table

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


def described(devices: dict, programs: list[dict], compiles: bool) -> list[dict]:
    """What `main` says of each program."""
    path = [str(COMPILERS / devices["kind"]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.plan.compile"],
        input=json.dumps({"devices": devices if compiles else None, "programs": programs}),
        env={**os.environ, **VARIABLES, "PYTHONPATH": os.pathsep.join(path)},
        cwd=HERE.parents[1],
        capture_output=True,  # libtpu complains of the TPU that is not there
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the compiler's process ended: {done.stderr[-3000:]}")
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for each in told:
        if "error" in each:
            raise UserError(f"{devices['topology']}: {each['error']}")
    return told


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


# Each of these gives a Program. a: its arguments, in the order of `Plan.programs`.


def decode(config, mesh, a) -> Program:
    """A step of all slots."""
    drawing, dtype = generate.Sampling(**a.flags), jnp.dtype(a.dtype)
    params = placement.unstacked(placement.parameters(config, mesh, dtype))
    state = jax.eval_shape(partial(generate._empty, config, a.slots, a.length, drawing, dtype))
    state = jax.tree.map(lambda x: _whole(mesh, x.shape, x.dtype), state)
    state |= {"cache": kv_cache.abstract_cache(config, mesh, a.slots, a.length, dtype)}
    advance = partial(generate._advance, config=config, sampling=drawing, dtype=dtype)
    return Program(
        jax.jit(advance, donate_argnums=1),
        (params, state, _whole(mesh, ())),
        {"parameters": params, "cache": state["cache"]},
        devices=mesh.size,
    )


def prefill(config, mesh, a) -> Program:
    """A row of prompts, beside the slots' cache."""
    dtype, names = jnp.dtype(a.dtype), ("tokens", "positions", "prompts")
    params = placement.unstacked(placement.parameters(config, mesh, dtype))
    cache = kv_cache.abstract_cache(config, mesh, a.slots, a.length, dtype)
    # The program has no use for the vocabulary's matrix, so the compiler leaves it out.
    unused = {name: x for name, x in params.items() if name == "unembed"}
    used = {name: x for name, x in params.items() if name != "unembed"}
    return Program(
        jax.jit(lambda params, row: generate._prefill(params, config, row, dtype)),
        (params, {name: _whole(mesh, (1, a.tokens)) for name in names}),
        {"parameters": used},
        {"parameters": unused, "cache": cache},
        devices=mesh.shape["tensor"],  # one row: on every part of the batch
    )


def _batch(mesh, a) -> tuple[dict, int]:
    """(shapes of a micro-batch of alike pairs, chunks of its responses in model/logprobs.py)."""
    pair = packing.Sequence([3] * a.prompt, [[4] * a.answer, [5] * a.answer])
    shards = meshes.batch_shards(mesh)
    packed = packing.pack([pair] * a.pairs, shards)
    rows, t = packed["targets"].shape
    step = min(t, max(1, logprobs.CHUNK * shards // rows))
    chunks = -(-int((packed["owners"] >= 0).sum(axis=1).max()) // step)
    return meshes.abstract(packed, meshes.batch_shardings(mesh, packed)), chunks


def gradients(config, mesh, a) -> Program:
    """Of a micro-batch; where there are several, they are added to those of another one."""
    params, (batch, chunks) = placement.parameters(config, mesh), _batch(mesh, a)
    how = {"config": config, "dtype": jnp.dtype(a.dtype), "remat": a.remat}
    loss = partial(losses.pair_loss, loss=losses.Loss(), **how)
    trainer = train.Trainer(loss, train.Optimization(**a.optimization), 100, params)
    sides = [name for name in losses.Pairs._fields if not name.startswith("pi_")]
    batch |= {name: _whole(mesh, (a.pairs,), np.float32) for name in (*sides, "weights")}
    return Program(
        trainer.accumulate,
        (params, params if a.several else None, batch, _whole(mesh, (), np.float32)),
        {"parameters": params, "gradients": params},
        {"moments": trainer.optimizer_state},
        mesh.size,
        chunks,
    )


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


def main() -> None:
    asked, chips = json.load(sys.stdin), []
    if asked["devices"]:
        try:
            chips = _devices(**asked["devices"])
        except (ValueError, FileNotFoundError, jax.errors.JaxRuntimeError) as error:
            return print(json.dumps({"error": f"no such devices: {first_line(error)[:200]}"}))
    for program in asked["programs"]:
        sizes, build = tuple(program["mesh"]), BUILDERS[program["build"]]
        kind = deberta.DebertaConfig if build is layer else configs.DecoderConfig
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
        usual = {**work, "cycles": told["cycles"] * share, "exchange": exchange}
        told |= {"name": program["name"], "usual": usual}
        print(json.dumps(told), flush=True)


def _devices(kind: str, chip: str, topology: str, size: int) -> list:
    if kind == "cpu":
        return jax.devices()[:1]
    if kind == "cuda":
        target = (HERE / f"{chip}.target_config.txtpb").read_text()
        more = {"target_config": target, "topology": topology}
        return topologies.get_topology_desc(platform=kind, **more).devices
    # One chip is taken out of four.
    name = topology.replace(":1x1", ":2x2") if size == 1 else topology
    return topologies.get_topology_desc(platform=kind, topology_name=name).devices[:size]


if __name__ == "__main__":
    main()
