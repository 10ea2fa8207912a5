"""Operations of a traced program; cycles and exchange by the text of a compiled one."""

import math
import re

import jax


def operations(jaxpr, trips: int = 1) -> float:
    """FLOPs of the matrix products in a jaxpr, over all devices. A loop's body counts as often as
    it runs; `trips`: how often, where that depends on the data."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params, times = eqn.primitive.name, eqn.params, 1
        inner = [operations(each, trips) for each in jax.core.jaxprs_in_params(params)]
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
        elif name == "pallas_call" and params["cost_estimate"] is not None:
            inner = [params["cost_estimate"].flops]
        elif name == "pallas_call":
            times = math.prod(params["grid_mapping"].grid)
        total += times * sum(inner)
    return total


# ---------------------------------------------------------------- a compiled program's text

HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) .*->.*\{$")
CYCLES = re.compile(r'estimated_cycles":"(\d{1,15})"')  # 19 digits: not known
CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
CONSTANT = re.compile(r"\s*%([\w.\-]+) = s32.* constant\((\d+)\)")
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
ARRAY = re.compile(r"\b(?:pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")


def compiled_work(text: str, devices: int, trips: int = 1) -> dict[str, float]:
    """{"cycles", "exchange"} of one device: the cycles that a TPU's compiler estimates (it has none
    for Pallas kernels and exchanges), and the bytes that arrive from other devices."""
    blocks: dict[str, list[str]] = {}
    entry = ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            lines = blocks[header[2]] = []
            entry = header[2] if header[1] else entry
        elif blocks:
            lines.append(line)
    done: dict[str, tuple[float, float]] = {}

    def of_block(name: str) -> tuple[float, float]:
        """(cycles, bytes) of a computation, with those that it calls."""
        if name not in done:
            scattered = name.startswith("all-reduce-scatter")
            cycles = moved = 0.0
            for line in blocks.get(name, []):
                estimate = CYCLES.search(line)
                cycles += float(estimate[1]) if estimate else 0.0
                moved += _moved(line, devices, scattered)
                times = _trips(line, blocks, trips) if " while(" in line else 1
                for called in CALLED.findall(line):
                    inner = of_block(called)
                    # A fusion's own estimate covers what is in it.
                    cycles += 0 if " fusion(" in line else times * inner[0]
                    moved += times * inner[1]
            done[name] = cycles, moved
        return done[name]

    return dict(zip(("cycles", "exchange"), of_block(entry)))


def _trips(line: str, blocks: dict[str, list[str]], unknown: int) -> int:
    """How often a while loop runs: as the compiler says, or by a condition `i < constant`."""
    if known := TRIPS.search(line):
        return int(known[1])
    condition = blocks[re.search(r"condition=%?([\w.\-]+)", line)[1]]
    root = next(each for each in condition if "ROOT" in each)
    constants = dict(found.groups() for found in map(CONSTANT.match, condition) if found)
    if " compare(" not in root or "direction=LT" not in root:
        return unknown
    names = re.findall(r"%([\w.\-]+)", root.split(" compare(")[1].split(")")[0])
    return next((int(constants[name]) for name in names if name in constants), unknown)


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
    if start and kind != "all-reduce":  # (inputs, outputs)
        sizes = sizes[len(sizes) // 2 :]
    times = {"all-reduce": 1 if scattered else 2, "reduce-scatter": devices}
    return sum(sizes) * (1 - 1 / devices) * times.get(kind, 1)
