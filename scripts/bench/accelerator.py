"""What this machine's accelerator reaches, measured in a few minutes.

    python -m scripts.bench accelerator                                  all pieces
    python -m scripts.bench accelerator --only decode --only dpo         two of them
    python -m scripts.bench accelerator --tiny                           small sizes, any machine

It needs jax, flax, optax, orbax-checkpoint and numpy, and downloads nothing: random weights of
Mistral-7B's and PairRM's shapes are made on the device. One device is measured, the first.

    rates         copies and matrix products: what the other figures are shares of
    kernels       each fused kernel of this project against the plain form: values and time
    prefill       the sampling engine's prefill, in bfloat16
    pairrm        PairRM's comparisons of 1,143 tokens, in bfloat16 and float32
    decode        the sampling engine's steps, in bfloat16: 16, 64 and 256 slots of 1,024 positions,
                  against the time that reading the weights and the live cache takes at the copy
                  rate, and the ten largest kernels of a step
    checkpoint    a save and a restore of a training state, in TMPDIR
    dpo           DPO steps at 7B's widths, with as many layers as fit with float32 masters, moments
                  and gradients, nothing rematerialised. MFU counts products with weights, attention
                  and the vocabulary, the backward pass as two forward passes; the reference's pass
                  is told apart. Pairs per second are scaled to 32 layers by operations
    transformers  Hugging Face's generate at the size of `decode`, where torch and transformers are

Each figure is printed and written as soon as it is known. A piece that fails or takes too long says
so, and the rest goes on: pieces run in a process of their own, which is ended with a piece that
runs out of its time. The results are a JSON and a table beside it (.md), by default in
scripts/bench/results/; with --tiny they are kept only where --out says.
"""

import argparse
import contextlib
import gc
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# Piece → (seconds on an H100, about; its process). Cheapest first within a process. Training has a
# process of its own, so that its peak memory is its own; torch, since jax keeps the memory it has.
PIECES = {
    "rates": (10, "jax"),
    "kernels": (10, "jax"),
    "prefill": (15, "jax"),
    "pairrm": (35, "jax"),
    "decode": (75, "jax"),
    "checkpoint": (25, "training"),
    "dpo": (70, "training"),
    "transformers": (60, "torch"),
}
START = 120  # seconds within which a process must be ready


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--only",
        action="append",
        choices=PIECES,
        metavar="PIECE",
        help="measure this piece alone; may be repeated",
    )
    add("--minutes", type=float, default=5, help="for everything, compilation included; default 5")
    add("--out", help="JSON file; default: scripts/bench/results/NAME-OF-CARD-DATE.json")
    add("--tiny", action="store_true", help="small sizes, to try the command itself")
    add("--layers", type=int, help="layers of the decoder; default 32, and in dpo what fits")
    add("--slots", type=int, action="append", help="slots of decode; may be repeated")
    add("--tokens", type=int, help="tokens of a DPO step, at least; default 8192")
    add("--comparisons", type=int, help="comparisons in a call of PairRM; default 8")
    args = parser.parse_args(words)
    for name in ("minutes", "layers", "tokens", "comparisons"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name} is {value}: it must be above 0")
    if args.slots and min(args.slots) < 1:
        parser.error(f"--slots is {min(args.slots)}: it must be at least 1")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        parser.error(f"--out {args.out}: its folder does not exist: make it first")
    return args


# ----------------------------------------------------------------------------- the worker


def work(pipe, kind: str, flags: dict) -> None:
    """In a process of its own: for each (piece, seconds, rates) that comes through the pipe, the
    piece's rows, then how it ended."""
    # 8% are left for what lies outside jax's pool: the driver's context, cuBLAS's workspaces.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name of the same
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # jax would take the memory of all GPUs
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns at every save
    try:
        from scripts.bench import measuring, pieces, shapes  # they import jax: not for --help

        pipe.send(("ready", {} if kind == "torch" else measuring.facts()))
    except Exception as error:
        return pipe.send(("unusable", f"{type(error).__name__}: {error}"))
    while True:
        try:
            piece, seconds, rates = pipe.recv()
        except EOFError:
            return None
        end = time.monotonic() + seconds
        given = measuring.Given(shapes.sizes(**flags), end, rates, flags["tiny"])
        try:
            for row in pieces.PIECES[piece](given):
                pipe.send(("row", row))
            pipe.send(("end", ("done", "", given.rates)))
        except measuring.Skip as skip:
            pipe.send(("end", ("skipped", str(skip), given.rates)))
        except Exception as error:
            pipe.send(("end", ("failed", measuring.reason(error), given.rates)))
        gc.collect()  # the arrays of a piece that failed hang on its traceback


class Worker:
    """A process that runs pieces. Raises RuntimeError where it does not come up."""

    def __init__(self, kind: str, flags: dict, seconds: float):
        context = multiprocessing.get_context("spawn")
        self.kind = kind
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, kind, flags), daemon=True)
        self.process.start()
        other.close()
        what, told = self.next(seconds)
        if what != "ready":
            self.end()
            raise RuntimeError(told)
        self.facts = told

    def next(self, seconds: float) -> tuple[str, object]:
        """What it tells next; ("late", …) where nothing comes in so many seconds."""
        try:
            if self.pipe.poll(max(0, seconds)):
                return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            return "died", f"its process ended with exit code {self.process.exitcode}"
        return "late", f"nothing came within {seconds:.0f} s"

    def end(self) -> None:
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


# ------------------------------------------------------------------------------ the report


class Report:
    """The results, written anew at each figure."""

    def __init__(self, args: argparse.Namespace):
        self.out = Path(args.out) if args.out else None
        self.keep = not args.tiny
        self.told = {
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "arguments": {name: x for name, x in vars(args).items() if x and name != "out"},
            "code": printed("git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty")
            or None,
            "machine": nvidia_smi(),
            "pieces": {},
        }

    def facts(self, facts: dict) -> None:
        """Known once a process has come up."""
        self.told["machine"] |= facts
        if self.out is None and self.keep:
            self.out = unused(self.card)
        self.write()

    @property
    def card(self) -> str:
        machine = self.told["machine"]
        return machine.get("device") or machine.get("card") or "unknown"

    def write(self) -> None:
        if self.out is None:
            return
        texts = json.dumps(self.told, indent=1) + "\n", self.table()
        try:
            self.out.parent.mkdir(exist_ok=True)
            for path, text in zip((self.out, self.out.with_suffix(".md")), texts):
                temporary = path.with_name(f"{path.name}.tmp")
                temporary.write_text(text)
                temporary.replace(path)
        except OSError as error:  # the measuring goes on
            print(f"{self.out} cannot be written ({error.strerror}): nothing is kept")
            self.out = None

    def table(self) -> str:
        machine = self.told["machine"]
        driver = f", driver {machine['driver']}" if "driver" in machine else ""
        lines = [
            f"{self.card}{driver}, jax {machine.get('jax', '–')}, Python "
            f"{machine.get('python', sys.version.split()[0])}, {self.told['date'][:10]}",
            "",
            "| piece | what | result |",
            "|-|-|-|",
        ]
        profiles = []
        for piece, found in self.told["pieces"].items():
            for row in found["rows"]:
                if "kernels" in row:
                    profiles.append(row)
                else:
                    lines.append(f"| {piece} | {row['name']} | {figures(row)} |")
            if found["status"] not in ("done", "running"):
                lines.append(f"| {piece} | {found['status']} | {found['reason']} |")
        for row in profiles:
            lines += ["", f"| {row['name']} | scope | per step | ms | share |", "|-|-|-|-|-|"]
            lines += [
                f"| {k['kernel']} | {k['scope']} | {k['times_per_step']:.4g} | "
                f"{k['ms_per_step']:.3g} | {k['share']:.1%} |"
                for k in row["kernels"]
            ]
        return "\n".join(lines) + "\n"


def figures(row: dict) -> str:
    """A row's figures on one line: bytes in GB, shares in percent."""
    told = []
    for name, x in row.items():
        words = name.replace("_", " ")
        if name in ("name", "kernels") or x is None:
            continue
        if name.endswith("_bytes"):
            told.append(f"{words[: -len(' bytes')]} {x / 1e9:.3g} GB")
        elif "share" in name or (name.startswith("mfu") and isinstance(x, float)):
            told.append(f"{words} {x:.1%}")
        elif isinstance(x, float) or (isinstance(x, int) and x > 10**6):
            unit = {"gb per second": "GB/s", "tflop per second": "TFLOP/s"}.get(words)
            told.append(f"{x:.4g} {unit}" if unit else f"{words} {x:.4g}")
        else:
            told.append(f"{words} {x}")
    return ", ".join(told)


def printed(*command: str) -> str:
    """What a command prints; nothing where there is no such command or it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return run.stdout.strip()
    return ""


def nvidia_smi() -> dict:
    """The first card's name and its driver."""
    cards = printed("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    name, comma, driver = cards.partition("\n")[0].rpartition(",")
    return {"card": name.strip(), "driver": driver.strip()} if comma else {}


def unused(card: str) -> Path:
    """A file for this card and day that does not exist yet: results are kept."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", card).strip("-") + time.strftime("-%Y-%m-%d")
    path, number = RESULTS / f"{name}.json", 1
    while path.exists():
        number += 1
        path = RESULTS / f"{name}-{number}.json"
    return path


# ----------------------------------------------------------------------------- the pieces


def measure(args: argparse.Namespace, report: Report) -> None:
    """All pieces that are asked for, one after the other, each within its time."""
    end = time.monotonic() + 60 * args.minutes
    flags = {n: getattr(args, n) for n in ("tiny", "layers", "slots", "tokens", "comparisons")}
    wanted = [name for name in PIECES if args.only is None or name in args.only]
    worker, rates, unusable = None, {}, {}  # kind of process → why it does not come up
    for number, piece in enumerate(wanted):
        begun, (expected, kind) = time.monotonic(), PIECES[piece]
        found = report.told["pieces"][piece] = {"status": "running", "rows": []}
        if worker is not None and worker.kind != kind:
            worker.end()
            worker = None
        if worker is None and kind not in unusable and end - begun > 2:
            try:
                worker = Worker(kind, flags, min(START, end - begun))
            except RuntimeError as error:
                unusable[kind] = str(error)
            else:
                refuse_cpu(args, worker)
                report.facts(worker.facts)
        left = end - time.monotonic()
        if kind in unusable:
            found["status"], found["reason"] = "failed", unusable[kind]
        elif left < 2:
            found["status"], found["reason"] = "out of time", "no time was left for it"
        else:
            # Half as long again as its part of what is left; nothing is ended before 45 s.
            part = expected / sum(PIECES[name][0] for name in wanted[number:])
            seconds = min(left, max(45, 1.5 * part * left))
            found["status"], found["reason"], rates = _one(
                worker, piece, seconds, rates, found["rows"], report
            )
            if found["status"] in ("out of time", "died"):
                worker.end()
                worker = None
        found["seconds"] = round(time.monotonic() - begun, 1)
        reason = f": {found['reason']}" if found["reason"] else ""
        print(f"{piece}: {found['status']} in {found['seconds']} s{reason}", flush=True)
        report.write()
    if worker is not None:
        worker.end()


def _one(worker, piece: str, seconds: float, rates: dict, rows: list, report: Report):
    """Run one piece: (status, reason, the rates known after it)."""
    end = time.monotonic() + seconds
    with contextlib.suppress(ConnectionError):  # it died: the next look says so
        worker.pipe.send((piece, 0.9 * seconds, rates))
    while True:
        what, told = worker.next(end - time.monotonic())
        if what == "row":
            rows.append(told)
            print(f"  {piece}: {told['name']}: {figures(told)}", flush=True)
            for k in told.get("kernels", ()):
                print(
                    f"    {k['ms_per_step']:8.3f} ms {k['share']:6.1%}  {k['kernel']}  {k['scope']}"
                )
            report.write()
        elif what == "end":
            return told
        elif what == "late":
            worker.process.kill()
            return "out of time", f"it was ended after {seconds:.0f} s", rates
        else:
            return "died", told, rates


def refuse_cpu(args: argparse.Namespace, worker: Worker) -> None:
    """Minutes of an accelerator are not spent on a jax that does not see it."""
    meant = args.tiny or os.environ.get("JAX_PLATFORMS") == "cpu"
    if worker.facts.get("platform") == "cpu" and not meant:
        worker.end()
        print(
            "error: jax sees no accelerator here: install its build for this machine "
            "(jax[cuda13], jax[tpu]); JAX_PLATFORMS=cpu measures the CPU, --tiny any machine",
            file=sys.stderr,
        )
        sys.exit(2)


def main(words: list[str]) -> int:
    args = parse(words)
    report = Report(args)
    try:
        measure(args, report)
    except KeyboardInterrupt:
        print("stopped: what is known is below", file=sys.stderr)
    print(f"\n{report.table()}")
    if report.out is not None:
        print(f"written: {report.out} and {report.out.with_suffix('.md').name}")
    done = [found["status"] == "done" for found in report.told["pieces"].values()]
    return 0 if any(done) else 1
