"""Where a program's time goes on the device: the largest kernels of a profile, with their scopes.

jax.profiler writes the profile and reads it back; no other package is needed. The profile names an
instruction of the compiled program, and the program's own text says in which `jax.named_scope` that
instruction was written.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax

# Parts of an instruction's path that every program has: they say nothing about where it stands.
FRAMES = re.compile(
    r"p?jit\(.*|while|body|cond|closed_call|checkpoint|rematted_computation|eval_jaxpr|branch_\d+(_fun)?"
)


def profiled(run: Callable[[], None], folder: str) -> None:
    """Write a profile of `run()` to the folder. run waits for the device itself."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # the host's own work would be most of the file
    with jax.profiler.trace(folder, profiler_options=options):
        run()


def scopes(program_text: str) -> dict[str, str]:
    """Instruction → its scope ("attention/dot_general"), from a compiled program's `as_text()`."""
    pattern = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
    scope_of = {}
    for name, path in pattern.findall(program_text):
        parts = [part for part in path.split("/") if not FRAMES.fullmatch(part)]
        scope_of[name] = "/".join(parts[-3:])
    return scope_of


def largest(folder: str, scope_of: dict[str, str], steps: int, count: int = 10) -> list[dict]:
    """The `count` largest kernels by time, largest first: each with its kind, its scope, how often
    a step runs it, the milliseconds per step and its share of all kernels' time. Kernels of one
    kind in one scope, those of all layers say, are one entry.

    steps: how many the profile covers. Raises ValueError where the profile holds no kernels.
    """
    files = sorted(Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise ValueError("the profiler wrote no profile")
    nanoseconds: dict[tuple[str, str], float] = defaultdict(float)
    times: dict[tuple[str, str], int] = defaultdict(int)
    # The profile names kernels as the compiler's files do: "loop_add_fusion_3" of fusion.3.
    by_file_name = {name.replace(".", "_").replace("-", "_"): s for name, s in scope_of.items()}
    for events in _lines(jax.profiler.ProfileData.from_file(str(files[-1]))):
        for name, instruction, own in _own_times(events):
            scope = scope_of.get(instruction) or by_file_name.get(name, "")
            kernel = re.sub(r"([._]\d+)+$", "", name), scope
            nanoseconds[kernel] += own
            times[kernel] += 1
    total = sum(nanoseconds.values())
    if not total:
        raise ValueError("the profile holds no kernels")
    first = sorted(nanoseconds, key=lambda kernel: -nanoseconds[kernel])[:count]
    return [
        {
            "kernel": kernel[0][:80],
            "scope": kernel[1],
            "times_per_step": times[kernel] / steps,
            "ms_per_step": nanoseconds[kernel] / 1e6 / steps,
            "share": nanoseconds[kernel] / total,
        }
        for kernel in first
    ]


def _lines(profile) -> list[list]:
    """The lines of events that hold kernels: a GPU's streams, a TPU's operations, or on CPU the
    threads that run thunks. Events: (start, end, name, instruction)."""
    planes = [plane for plane in profile.planes if re.match(r"/device:(GPU|TPU):\d+$", plane.name)]
    lines = [line for plane in planes or profile.planes for line in plane.lines]
    kernels = [line for line in lines if line.name.startswith("Stream") or line.name == "XLA Ops"]
    found = []
    for line in kernels or lines:
        events = []
        for event in line.events:
            # On a TPU an event is named by its whole instruction: "%fusion.3 = bf16[…] fusion(…)".
            name = event.name.split(" = ")[0].lstrip("%")
            stats = dict(event.stats)
            if planes or "hlo_op" in stats:
                end = event.start_ns + event.duration_ns
                events.append((event.start_ns, end, name, stats.get("hlo_op", name)))
        found.append(events)
    return found


def _own_times(events: list[tuple]):
    """(name, instruction, nanoseconds of its own) of each event of a line: a loop's or a call's
    time without that of what runs inside it."""
    open_events: list[list] = []  # [end, name, instruction, own time], each inside the one before
    for start, end, name, instruction in sorted(events, key=lambda e: (e[0], -e[1])):
        while open_events and open_events[-1][0] <= start:
            yield tuple(open_events.pop()[1:])
        if open_events:
            open_events[-1][3] -= min(end, open_events[-1][0]) - start
        open_events.append([end, name, instruction, end - start])
    while open_events:
        yield tuple(open_events.pop()[1:])
