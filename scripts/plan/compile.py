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
import re
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
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType

from model import decoder, kv_cache, logprobs, losses, packing, slot_state, train
from model.config import DecoderConfig
from model.precision import precision_of
from model.prompt_rows import PREFILL_PROMPTS
from model.rankers import deberta, deberta_tpu
from scripts.bench import shapes
from scripts.plan import slices
from sharding import mesh as meshes
from sharding import table
from sharding.chips import CHIPS
from sharding.errors import UserError, first_line

HERE = Path(__file__).parent
COMPILERS = HERE.parents[1] / ".compilers"
MODULES = {"cpu": "jax", "tpu": "libtpu", "cuda": "jax_cuda13_plugin"}  # that hold a compiler
VARIABLES = {  # look for no device, ask no cloud which machine this is, allow other compilations
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def installed(kind: str) -> bool:
    """Whether a compiler for these devices is installed, by scripts/plan/setup.sh or beside JAX."""
    return (COMPILERS / kind).is_dir() or importlib.util.find_spec(MODULES[kind]) is not None


def described(on: slices.Slice, programs: list[dict], compiles: bool) -> list[dict]:
    """The figures of each program, as `main` prints them."""
    path = [str(COMPILERS / on.compiler), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.plan.compile", str(on) if compiles else ""],
        input=json.dumps(programs),
        env={**os.environ, **VARIABLES, "PYTHONPATH": os.pathsep.join(path)},
        cwd=HERE.parents[1],
        capture_output=True,  # libtpu complains that there is no TPU
        text=True,
    )
    if done.returncode == 2:
        raise UserError(f"{on}: {done.stdout.strip()}")
    if done.returncode:
        raise RuntimeError(f"the compiler's process ended: {done.stderr[-3000:]}")
    return list(map(json.loads, done.stdout.splitlines()))


# ---------------------------------------------------------------- in the compiler's process
# In the builders, `a` holds the stage's flags and what `Plan.programs` adds to them.


@dataclasses.dataclass
class Program:
    """A jitted function, and what lies on the devices while it runs."""

    call: Callable
    args: tuple
    inside: dict  # title → shapes of its arguments and results
    beside: dict = dataclasses.field(default_factory=dict)  # of other arrays in memory
    devices: int = 1  # how many share its products
    trips: int = 1  # rounds of an outermost loop whose end depends on the data
    steps: int = 1  # of one call; the figures are per step

    def traced(self):
        """(the traced function, {"flops", "bytes"} of one device)."""
        traced = self.call.trace(*self.args)
        flops = operations(traced.jaxpr.jaxpr, self.trips) / self.devices / self.steps
        inside = sum(map(table.bytes_per_device, self.inside.values()))
        return traced, {"flops": flops, "bytes": inside}

    def describe(self, compiles: bool, size: int) -> dict:
        """{"parts": title → bytes, "flops", "bytes", "cycles", "exchange"} of one device, and the
        compiled "text"; "refused" if the compiler finds it too large. Without compiling there are
        no temporaries, cycles, exchange and text."""
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
            told["text"] = compiled.as_text()
            done = compiled_work(told["text"], size, self.trips)
            told |= {name: x / self.steps for name, x in done.items()}
        return told


def _whole(mesh, dimensions, dtype=np.int32):
    """The shape of an array that every device holds whole."""
    return jax.ShapeDtypeStruct(dimensions, dtype, sharding=meshes.replicated(mesh))


def _sampler(config, mesh, a) -> tuple:
    """(the parameters, the slots' state, the keywords of the programs that compute with them)."""
    precision = precision_of(a.dtype, a.chip)
    params = kv_cache.unstacked(decoder.abstract(config, mesh, precision.operands))
    kept = kv_cache.abstract_cache(config, mesh, a.slots, a.length, precision.activations)
    state = jax.eval_shape(lambda: slot_state.empty(config, a.slots, a.length, precision))
    state = jax.tree.map(lambda x: _whole(mesh, x.shape, x.dtype), state) | {"cache": kept}
    return params, state, {"config": config, "precision": precision}


def decode(config, mesh, a) -> Program:
    """A step of all slots, within a call of STEPS_PER_CALL steps."""
    params, state, how = _sampler(config, mesh, a)
    advance = partial(slot_state.advance, **how, side_buffer=a.side_buffer)
    advance, steps = jax.jit(advance, donate_argnums=1), slot_state.STEPS_PER_CALL
    args = (params, state, _whole(mesh, ()), _whole(mesh, ()))
    inside = {"parameters": params, "cache": state["cache"]}
    return Program(advance, args, inside, devices=mesh.size, trips=steps, steps=steps)


def prefill(config, mesh, a) -> Program:
    """The prefill of a row of prompts, while the slots' cache lies in memory too."""
    params, state, how = _sampler(config, mesh, a)
    row = {name: _whole(mesh, (1, a.tokens)) for name in ("tokens", "positions", "prompts")}
    # The program has no use for the vocabulary's matrix, so the compiler leaves it out.
    used = {name: x for name, x in params.items() if name != "unembed"}
    beside = {"parameters": params.get("unembed", ()), "cache": state["cache"]}
    call = jax.jit(lambda params, row: kv_cache.prefill(params, **how, **row))
    # One row is not cut along the batch: every part of the mesh computes it.
    return Program(call, (params, row), {"parameters": used}, beside, mesh.shape["tensor"])


def start(config, mesh, a) -> Program:
    """The start of answers: the prompts of a full row are copied to the slots."""
    params, state, how = _sampler(config, mesh, a)
    row_kv = kv_cache.abstract_cache(config, mesh, 1, a.tokens, how["precision"].activations)
    logits_pv = _whole(mesh, (PREFILL_PROMPTS, config.vocab_size), np.float32)
    starting = slot_state.nothing_starts(PREFILL_PROMPTS * min(a.n, a.slots), a.slots)
    call = jax.jit(partial(slot_state.WHOLE[1], config=config), donate_argnums=0)
    args = (state, row_kv, logits_pv, starting)
    return Program(call, args, {"cache": state["cache"]}, {"parameters": params})


def gradients(config, mesh, a) -> Program:
    """The gradients of a micro-batch of equal pairs, added to those of another if it has one."""
    params, size = decoder.abstract(config, mesh), a.micro_batch_size
    answer = a.max_length - a.max_prompt_length
    pair = packing.Sequence([3] * a.max_prompt_length, [[4] * answer, [5] * answer])
    packed = packing.pack([pair] * size, meshes.batch_shards(mesh))
    batch = meshes.placed_batch(mesh, packed)
    sides = [name for name in losses.Pairs._fields if not name.startswith("pi_")]
    batch |= {name: _whole(mesh, (size,), np.float32) for name in (*sides, "weights")}
    how = {"config": config, "precision": precision_of(a.dtype, a.chip), "remat": a.remat}
    loss = partial(losses.pair_loss, loss=losses.Loss(), **how)
    settings = {f.name: getattr(a, f.name) for f in dataclasses.fields(train.Optimization)}
    trainer = train.Trainer(loss, train.Optimization(**settings), 100, params)
    before = params if a.batch_size > size else None
    # The chunks of the responses in model/logprobs.py.
    step = logprobs.chunk_length(*packed["targets"].shape, mesh.abstract_mesh)
    chunks = -(-int((packed["owners"] >= 0).sum(axis=1).max()) // step)
    args = (params, before, batch, _whole(mesh, (), np.float32))
    inside = {"parameters": params, "gradients": params}
    beside = {"moments": trainer.optimizer_state}
    return Program(trainer.accumulate, args, inside, beside, mesh.size, chunks)


def layer(_, mesh, a) -> Program:
    """A layer of PairRM over some comparisons, with the other layers' weights in memory too."""
    kernel = a.chip in CHIPS and any(map(deberta_tpu.runs_on, CHIPS[a.chip].kinds))
    config, precision = shapes.PAIRRM, precision_of(a.dtype, a.chip)
    prepare = partial(deberta.prepare, config=config, precision=precision)
    params = jax.eval_shape(prepare, shapes.encoder(config))
    params = jax.tree.map(lambda x: _whole(mesh, x.shape, x.dtype), params)
    first, *others = params.pop("layers")
    x_btd = _whole(mesh, (a.rows, a.length, config.hidden_size), precision.activations)
    args = (first, config, x_btd, _whole(mesh, x_btd.shape[:2], jnp.bool_), None, kernel)
    return Program(deberta.layer, args, {"parameters": first}, {"parameters": [params, others]})


BUILDERS = {each.__name__: each for each in (decode, prefill, start, gradients, layer)}


def main(topology: str) -> None:
    """Print the figures of each program that stdin asks for, a line of JSON each."""
    for program in json.load(sys.stdin):
        sizes, build = tuple(program["mesh"]), BUILDERS[program["build"]]
        eos = tuple(program["config"]["eos_token_ids"])
        config = DecoderConfig(**program["config"] | {"eos_token_ids": eos})
        try:
            mesh, use = _mesh(topology, sizes)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            print(f"its compiler knows no such machine or mesh: {first_line(error)[:200]}")
            sys.exit(2)
        # Built outside the mesh: optax makes a counter, and these devices run nothing.
        longest, usual = (
            build(config, mesh, SimpleNamespace(**program["given"] | more))
            for more in ({}, program["usual"])
        )
        with use(mesh):
            told = longest.describe(bool(topology), mesh.size)
            _, work = usual.traced()
        # Along fsdp weights are exchanged, the same number at any lengths.
        share = work["flops"] / told["flops"] if told["flops"] else 1.0
        exchange = told["exchange"] * (share if mesh.shape["fsdp"] == 1 else 1)
        work |= {"cycles": told["cycles"] * share, "exchange": exchange}
        print(json.dumps({"name": program["name"], "usual": work, **told}), flush=True)


def _mesh(topology: str, sizes: tuple) -> tuple:
    """(a mesh, how to set it). To trace a program, a mesh without devices is enough."""
    if not topology:
        kinds = (AxisType.Auto,) * len(sizes)
        return AbstractMesh(sizes, meshes.MESH_AXES, kinds), jax.sharding.use_abstract_mesh
    return meshes.make_mesh(*sizes, _devices(topology)[: math.prod(sizes)]), jax.set_mesh


def _devices(topology: str) -> list:
    if topology == "cpu":
        return jax.devices()
    on = slices.parse(topology)
    if on.compiler == "cuda":
        target = (HERE / f"{on.chip.name}.target_config.txtpb").read_text()
        more = {"target_config": target, "topology": f"{on.hosts}x1x{on.size // on.hosts}"}
        return topologies.get_topology_desc(platform="cuda", **more).devices
    # The compiler knows no slice of one chip: it is one of four.
    name = topology.replace(":1x1", ":2x2") if on.size == 1 else topology
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


# ---------------------------------------------------- operations, and a compiled program's text


def operations(jaxpr, trips: int = 1) -> float:
    """FLOPs of the matrix products in a jaxpr, over all devices. A loop's body counts as often as
    it runs. trips: how often if the data decides that (once for loops within such a loop)."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params, times = eqn.primitive.name, eqn.params, 1
        of_inner = 1 if name == "while" else trips
        inner = [operations(each, of_inner) for each in jaxprs_in_params(params)]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            inner = [2 * depth * eqn.outvars[0].aval.size]
        elif name == "scan":
            times = params["length"]
        elif name == "while":
            times = trips
        elif name == "cond":
            inner = [max(inner)]
        elif name == "shard_map":
            times = params["mesh"].size
        elif name == "pallas_call":
            cost, times = params["cost_estimate"], math.prod(params["grid_mapping"].grid)
            inner, times = ([cost.flops], 1) if cost else (inner, times)
        total += times * sum(inner)
    return total


HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) .*->.*\{$")
CYCLES = re.compile(r'estimated_cycles":"(\d{1,15})"')  # 19 digits mean not known
CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
CONSTANT = re.compile(r"\s*%([\w.\-]+) = [su]32.* constant\((\d+)\)")
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
ARRAY = re.compile(r"\b(?:pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")


def compiled_work(text: str, devices: int, trips: int = 1) -> dict[str, float]:
    """{"cycles", "exchange"} of one device: the cycles that a TPU's compiler estimates (it has none
    for Pallas kernels and exchanges), and the bytes that arrive from other devices. `trips` as in
    `operations`. The longest branch of a condition counts."""
    blocks: dict[str, list[str]] = {}
    entry = ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            lines = blocks[header[2]] = []
            entry = header[2] if header[1] else entry
        elif blocks:
            lines.append(line)
    done: dict[tuple[str, int], tuple[float, float]] = {}

    def of_block(name: str, trips: int) -> tuple[float, float]:
        """(cycles, bytes) of a computation, with those that it calls."""
        if (name, trips) not in done:
            scattered = name.startswith("all-reduce-scatter")
            cycles = moved = 0.0
            for line in blocks.get(name, []):
                estimate = CYCLES.search(line)
                cycles += float(estimate[1]) if estimate else 0.0
                moved += _moved(line, devices, scattered)
                times = _trips(line, blocks) if " while(" in line else 1
                of_inner = trips if times else 1
                inner = [of_block(called, of_inner) for called in CALLED.findall(line)]
                if branches := BRANCHES.search(line):
                    names = [branch.strip(" %") for branch in branches[1].split(",")]
                    inner.append(max(of_block(branch, trips) for branch in names))
                for each in inner:
                    # A fusion's own estimate covers what is in it.
                    cycles += 0 if " fusion(" in line else (times or trips) * each[0]
                    moved += (times or trips) * each[1]
            done[name, trips] = cycles, moved
        return done[name, trips]

    return dict(zip(("cycles", "exchange"), of_block(entry, trips)))


def _trips(line: str, blocks: dict[str, list[str]]) -> int:
    """How often a while loop runs: as the compiler says, or by a condition `i < constant`; 0 if it
    depends on the data."""
    if known := TRIPS.search(line):
        return int(known[1])
    condition = blocks[re.search(r"condition=%?([\w.\-]+)", line)[1]]
    root = next(each for each in condition if "ROOT" in each)
    constants = dict(found.groups() for found in map(CONSTANT.match, condition) if found)
    if " compare(" not in root or "direction=LT" not in root:
        return 0
    names = re.findall(r"%([\w.\-]+)", root.split(" compare(")[1].split(")")[0])
    return next((int(constants[name]) for name in names if name in constants), 0)


def _moved(line: str, devices: int, scattered: bool) -> float:
    """Bytes that one device receives in a collective; scattered: an all-reduce of which each device
    keeps its share."""
    found = COLLECTIVE.search(line)
    if not found or devices == 1:
        return 0.0
    arrays, kind, start = found.groups()
    sizes = [
        int(width or 8) / 8 * math.prod(int(n) for n in shape.split(",") if n)
        for width, shape in ARRAY.findall(arrays)
    ]
    if start and kind != "all-reduce":  # inputs, outputs, and indices of a permutation
        sizes = sizes[:1] if kind == "collective-permute" else sizes[len(sizes) // 2 :]
    times = {"all-reduce": 1 if scattered else 2, "reduce-scatter": devices}
    return sum(sizes) * (1 - 1 / devices) * times.get(kind, 1)


if __name__ == "__main__":
    main(sys.argv[1])
