"""Break the loop in every way, and check that it still ends with the same result.

    python -m scripts.torture /tmp/torture --kills 200 --each 20 --seed 0

runs scripts/iterate.sh on a tiny model of random weights, once unbroken. Then it breaks runs at
moments drawn from the seed, gives the same command again until it ends, and compares all files with
the unbroken run's, bit by bit. Most moments are calls that change a file: scripts/torture.c, which
every process loads, counts these calls. Those to break are drawn evenly from all stages, kinds of
file and kinds of call of the unbroken run. The other moments are times. FOLDER/results.json says
what was being done at each fault; FOLDER/wrong/ keeps the runs that ended with another result.

A try takes seconds, since the stages are forked from a process that has imported everything. Needs
Linux and a C compiler; a FOLDER in memory (/dev/shm) is quickest.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import importlib
import json
import mmap
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sharding.errors import UserError
from stages.files.run import run_main

ROOT = Path(__file__).parents[1]
COUNT, KILL, TERM, FULL, SHORT, FSYNC = range(6)  # as in torture.c
# Kind of fault → what torture.c does, the exit codes that are right then; -9: killed.
KINDS = {"kill": (KILL, {-9}), "term": (TERM, {75}), "term_twice": (TERM, {75})}
KINDS |= {"full": (FULL, {2}), "short": (SHORT, {0}), "fsync": (FSYNC, {2}), "clock": (KILL, {-9})}
KINDS |= {
    "two_copies": (KILL, {-9, 2, 0}),
    "read_only": (KILL, {-9}),
    "processes": (KILL, {-9, 75}),
}
OPS = {"fsync": ["fsync"], "full": ["open", "write", "mkdir", "fsync", "rename"]}
MONTH = 30 * 86400


class State(ctypes.Structure):
    """What torture.c reads: its `struct state`."""

    _fields_ = (
        *(("at", ctypes.c_uint64), ("count", ctypes.c_uint64)),
        *(("mode", ctypes.c_int32), ("when", ctypes.c_int32), ("shift", ctypes.c_int64)),
        *(("root", ctypes.c_char * 256), ("read_only", ctypes.c_char * 256)),
        *(("stage", ctypes.c_char * 1024), ("op", ctypes.c_char * 16)),
        ("log", ctypes.c_char * 256),
    )


@dataclasses.dataclass
class Args:
    folder: tyro.conf.Positional[str]
    """The folder of the runs; it must not exist."""
    kills: int = 200
    """How many kills with -9."""
    each: int = 20
    """How many faults of each other kind."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Which kinds; `processes` kills one of two processes."""
    seed: int = 0
    """The seed of all moments."""


@dataclasses.dataclass
class Fault:
    """The fault of one attempt, and its moment: call number `at` of the calls of kind `op` in
    `stage` (`when` 0: before it, 1: in the middle of a write, 2: after it), or after `seconds`."""

    kind: str = ""
    at: int = 0
    when: int = 0
    stage: str = ""
    op: str = ""
    seconds: float | None = None
    pause: float = 0.0  # between two signals, or two starts


# ------------------------------------------------------------------- the loop to be broken

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPE = """
model = "{inputs}/model"
ranker = "{inputs}/reward.py:reward"
iterations = 2
prompts = {{ file = "{inputs}/prompts.jsonl", rows_per_iteration = 8 }}
heldout = {{ file = "{inputs}/prompts.jsonl", first = 16 }}
sample = {{ n = 4, max_new_tokens = 12, temperature = 1 }}
pairs = {{ test_count = 2 }}
dpo = {{ learning_rate = 1e-3, batch_size = 2, micro_batch_size = 2, epochs = 2, save_every = 2 }}
"""
REWARD = "def reward(prompt, responses):\n    return [len(set(text)) for text in responses]\n"
MODEL = {"model_type": "llama", "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
MODEL |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
MODEL |= {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2}


def write_inputs(folder: Path) -> None:
    """The recipe and what it names: prompts, a reward function, a model in Hugging Face's form."""
    (folder / "model").mkdir(parents=True)
    words = "why how what who".split()
    texts = [f"{words[i % 4].title()} is {i} {'so very ' * (i % 3)}odd?" for i in range(22)]
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
    (folder / "prompts.jsonl").write_text("".join(lines))
    (folder / "reward.py").write_text(REWARD)
    (folder / "torture.toml").write_text(RECIPE.format(inputs=folder))
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    core.save(str(folder / "model" / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    named |= {"bos_token": special[1], "eos_token": special[2]}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(named))

    config = importlib.import_module("model.config").from_hf(MODEL)
    rng, tensors = np.random.default_rng(0), {}
    for name, slot in importlib.import_module("model.hf").slots(config).items():
        drawn = rng.normal(0, 0.2, slot.hf_shape(config)).astype(np.float32)
        tensors[name] = np.ones_like(drawn) if "norm" in name else drawn
    save_file(tensors, folder / "model" / "model.safetensors")


# Runs in place of Python: asks `serve` for a process, and ends as that process does.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
asked = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd(), os.getpgrp()]).encode()
socket.send_fds(server, [len(asked).to_bytes(4, "big")], [0, 1, 2])
server.sendall(asked)
code = int.from_bytes(server.recv(4) or b"\\0\\0\\0\\1", "big", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
IMPORTED = """jax tokenizers model.checkpoint model.generate model.hf model.logprobs model.train
    scripts.cards scripts.convert scripts.ready scripts.recipe scripts.report stages.dpo
    stages.evaluate.compare stages.evaluate.kl stages.files.examples stages.files.work scipy.stats
    tensorboardX.event_file_writer matplotlib.figure"""


def serve(path: str) -> None:
    """Fork a process for each request at the socket `path`. All modules are imported already, JAX
    has asked for no devices, and no other thread runs."""
    for name in IMPORTED.split():
        importlib.import_module(name)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    warnings.simplefilter("ignore")  # runpy warns of modules that are imported already
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asking = listening.accept()[0]
        if os.fork():
            asking.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        size, descriptors, *_ = socket.recv_fds(asking, 4, 3)
        asked = asking.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
        argv, environment, folder, group = json.loads(asked)
        if child := os.fork():
            for descriptor in descriptors:
                os.close(descriptor)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # the client was killed
                asking.send(code.to_bytes(4, "big", signed=True))
            os._exit(0)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # so was its group
            os.setpgid(0, group)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdout, sys.stderr = (open(n, "w", 1, closefd=False) for n in (1, 2))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment | {"TORTURE_STAGE": " ".join(argv)})
        sys.argv = argv[1:]
        try:
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(ended.code)  # freeing the imported modules would take most of the time


class Loop:
    """A run of the loop in `folder`, and what breaks it."""

    def __init__(self, folder: Path, inputs: Path):
        self.folder, self.inputs = folder, inputs
        self.run, self.log = folder / "runs" / "torture", folder / "calls"
        self.command = ["bash", "scripts/iterate.sh", str(inputs / "torture.toml")]
        (folder / "runs").mkdir(parents=True)
        library, client, path = folder / "torture.so", folder / "python", str(folder / "socket")
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        state = folder / "state"
        state.write_bytes(bytes(State()))
        with state.open("r+b") as file:
            self.state = State.from_buffer(mmap.mmap(file.fileno(), 0))
        client.write_text(CLIENT.format(python=sys.executable, path=path))
        client.chmod(0o755)
        alone = {k: x for k, x in os.environ.items() if k not in ("COORDINATOR", "NAME", "LIMIT")}
        self.environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        self.environment |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"} | alone
        self.environment |= {"RUNS": str(folder / "runs"), "PYTHON": str(client)}
        self.environment |= {"LD_PRELOAD": str(library), "TORTURE_STATE": str(state)}
        self.environment |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "PROCESS_TIMEOUT": "20"}
        self.environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        serving = [sys.executable, "-m", "scripts.torture", "--serve", path]
        self.server = subprocess.Popen(serving, cwd=ROOT, env=self.environment)
        while not os.path.exists(path) and self.server.poll() is None:
            time.sleep(0.05)

    def close(self) -> None:
        self.server.kill()
        self.server.wait()

    def attempt(self, fault: Fault, processes: int = 1) -> tuple[list[int], list[str], float]:
        """Run the loop until it ends: (exit codes, the calls at which the fault came, seconds from
        the second signal to the end)."""
        self.log.unlink(missing_ok=True)
        mode = COUNT if fault.seconds or not fault.kind else KINDS[fault.kind][0]
        state = State(at=fault.at, mode=mode, when=fault.when, op=fault.op.encode())
        state.root, state.stage = f"{self.run}/".encode(), fault.stage.encode()[:1023]
        state.log = str(self.log).encode()
        state.read_only = str(self.inputs).encode() if fault.kind == "read_only" else b""
        ctypes.pointer(self.state)[0] = state

        with socket.socket() as opened:
            opened.bind(("localhost", 0))
            place = {"COORDINATOR": f"localhost:{opened.getsockname()[1]}"}
        running, begun, second = [], time.monotonic(), None
        for i in range(max(processes, 2 if fault.kind == "two_copies" else 1)):
            several = place | {"PROCESSES": str(processes), "PROCESS_ID": str(i)}
            with open(self.folder / f"said.{i}", "w") as said:
                loop = subprocess.Popen(
                    self.command,
                    cwd=ROOT,
                    env=self.environment | (several if processes > 1 else {}),
                    process_group=0,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
            running.append(loop)
            time.sleep(fault.pause if fault.kind == "two_copies" else 0)
        while any(loop.poll() is None for loop in running) and time.monotonic() < begun + 600:
            time.sleep(0.01)
            if fault.kind == "clock" and time.monotonic() > begun + fault.pause:
                self.state.shift = -MONTH
            if fault.seconds and time.monotonic() > begun + fault.seconds:
                signal_group(
                    running[-1], signal.SIGTERM if "term" in fault.kind else signal.SIGKILL
                )
                break
            if fault.kind == "term_twice" and second is None and self.log.exists():
                time.sleep(fault.pause)
                second = time.monotonic()
                signal_group(running[0], signal.SIGTERM)
        codes = [wait(loop, begun + 600) for loop in running]
        took = time.monotonic() - second if second else 0.0
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        return codes, calls if fault.kind == "short" else calls[-1:], took

    def said(self) -> list[str]:
        return [file.read_text(errors="replace") for file in sorted(self.folder.glob("said.*"))]


def wait(loop: subprocess.Popen, until: float) -> int | None:
    """The exit code; None where it hangs. Nothing of its process group lives on."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        loop.wait(max(0.1, until - time.monotonic()))
    code = loop.poll()
    signal_group(loop, signal.SIGKILL)
    loop.wait()
    return code


def signal_group(loop: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(loop.pid, number)


# ----------------------------------------------------------------------- what came of it

TIMES = "seconds train_seconds last_sitting host_wait tokens_per_second mfu".split()
TIMES += ["model_flops_per_second", "peak_memory_gb"]
LEFT_OUT = r"tensorboard/|_CHECKPOINT_METADATA|^report.html|(^|/)\.[\w.]+$"  # times, marks
PHASES = {r"\.work/state": "training state", r"\.work": "training's folder"}
PHASES |= {r"checkpoint\.log": "training log", r"\.reference": "reference log-probs"}
PHASES |= {"checkpoint": "checkpoint", "final-hf": "export", r"\.partial": "rows in the making"}
PHASES |= {"manifest": "manifest", r"report|finished|settings|\.process_": "report and settings"}


def contents(run: Path) -> dict[str, bytes]:
    """The content of each file of a run, without the times in it."""
    files = {}
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        name, content = str(file.relative_to(run)), file.read_bytes()
        if name.endswith("metrics.jsonl"):
            content = json.dumps([timeless(json.loads(x)) for x in content.splitlines()]).encode()
        elif name.endswith(".json"):
            content = json.dumps(timeless(json.loads(content))).encode()
        if not re.search(LEFT_OUT, name):
            files[name] = content
    return files


def timeless(value):
    if isinstance(value, dict):
        return {k: timeless(x) for k, x in value.items() if k not in TIMES}
    return [timeless(x) for x in value] if isinstance(value, list) else value


def differences(run: Path, whole: Path) -> list[str]:
    ours, theirs = contents(run), contents(whole)
    return [f"{x} differs" for x in sorted(ours | theirs) if ours.get(x) != theirs.get(x)]


def described(call: str) -> tuple[str, str, str]:
    """(stage, kind of file, kind of call) of a line of the log."""
    stage, op, path = call.split("\t")
    words = re.sub(r"^-m (stages\.|scripts\.)?", "", stage).split()
    name = " ".join(words[:2]) if words[0] in ("evaluate", "convert", "the") else words[0]
    return name, next((x for key, x in PHASES.items() if re.search(key, path)), "rows"), op


def draw(
    rng: random.Random, calls: list[str], kind: str, links: int, tried: Counter
) -> Iterator[Fault]:
    """The faults of one run, in its order, at most one per stage. For each, some calls are drawn,
    and the one whose kind was tried least is taken."""
    of_stage: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for call in calls:
        stage, op, _ = call.split("\t")
        # Before process 0 has shown life, the others wait for ten minutes.
        if kind != "processes" or "scripts.recipe" not in stage:
            of_stage[stage].append((op, call))
    if kind == "short":  # cuts many writes short in one run, which goes on
        yield Fault(kind, rng.randrange(20, 200), op="write")
        return
    allowed = OPS.get(kind, {op for entries in of_stage.values() for op, _ in entries})
    stages = [s for s, entries in of_stage.items() if any(op in allowed for op, _ in entries)]
    for stage in sorted(rng.sample(stages, min(links, len(stages))), key=stages.index):
        if kind in ("kill", "term") and rng.random() < 0.2:
            yield Fault(kind, seconds=rng.uniform(0.2, 10))
        choice = rng.choices(
            [(n, *x) for n, x in enumerate(of_stage[stage]) if x[0] in allowed], k=8
        )
        n, op, call = min(choice, key=lambda entry: tried[described(entry[2])])
        tried[described(call)] += 1
        at = 1 + sum(other == op for other, _ in of_stage[stage][:n])
        yield Fault(kind, at, rng.randrange(3), stage, op, pause=rng.uniform(0, 1.5))


def judge(fault: Fault, codes: list[int], took: float, said: list[str]) -> list[str]:
    """What was wrong with the end of an attempt."""
    wrong = [f"exit codes {codes}"] if not set(codes) <= KINDS[fault.kind][1] else []
    if fault.kind in ("full", "fsync") and len(re.findall("^error: ", said[0], re.M)) != 1:
        wrong.append("not one line of error")
    if took > 5:
        wrong.append(f"{took:.1f} s from the second signal to the end")
    return wrong + ["traceback" for text in said if "Traceback" in text]


def break_a_run(loop: Loop, faults: list[Fault], whole: Path, keep: Path) -> list[dict]:
    """Break a run by one fault after the other, then let it end. A row per fault that came."""
    shutil.rmtree(loop.run, ignore_errors=True)
    processes, rows = 2 if faults[0].kind == "processes" else 1, []
    for fault in [*faults, Fault()]:
        codes, calls, took = loop.attempt(fault, processes)
        ended = codes == [0] * len(codes)
        for call in calls if fault.kind and (not ended or fault.kind == "short") else ():
            wrong = judge(fault, codes, took, loop.said())
            row = {"kind": fault.kind, "call": described(call), "codes": codes, "wrong": wrong}
            rows.append(row | {"fault": dataclasses.asdict(fault), "path": call.split("\t")[2]})
        if not fault.kind and not ended:
            rows.append({"kind": "end", "call": ("?",) * 3, "codes": codes, "wrong": ["no end"]})
        if rows and (rows[-1]["wrong"] or not (fault.kind or ended)):
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"said-{len(rows)}").write_text("\n\n".join(loop.said()))
        if ended:
            break
    if rows and ended and (wrong := differences(loop.run, whole)):
        rows[-1]["wrong"] += wrong
        shutil.copytree(loop.run, keep / "run", dirs_exist_ok=True)
    return rows


def main(args: Args) -> None:
    folder, rng, rows, wholes = Path(args.folder), random.Random(args.seed), [], {}
    if folder.exists():
        raise UserError(f"{folder} exists: choose another folder")
    if unknown := set(args.kinds) - KINDS.keys():
        raise UserError(f"--kinds {unknown.pop()}: known are {', '.join(KINDS)}")
    write_inputs(folder / "inputs")
    loop = Loop(folder / "loop", folder / "inputs")
    with contextlib.closing(loop):
        for processes in {2 if kind == "processes" else 1 for kind in args.kinds}:
            if any(loop.attempt(Fault(), processes)[0]):
                raise RuntimeError(f"the unbroken run fails: {loop.said()[0][-2000:]}")
            calls = loop.log.read_text().splitlines()
            wholes[processes] = loop.run.rename(folder / f"whole-{processes}"), calls
            print(f"unbroken, by {processes}: {len(calls)} calls change a file", flush=True)
        for kind in args.kinds:
            whole, calls = wholes[2 if kind == "processes" else 1]
            tried: Counter = Counter()
            left, chain = args.kills if kind == "kill" else args.each, 0
            while left > 0:
                faults, chain = list(draw(rng, calls, kind, min(left, 9), tried)), chain + 1
                new = break_a_run(loop, faults, whole, folder / "wrong" / f"{kind}-{chain}")
                rows, left = rows + new, left - max(1, len(new))
                for row in new:
                    print(kind, chain, *row["call"], row["codes"], row["wrong"], flush=True)
                (folder / "results.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))


def table(rows: list[dict]) -> str:
    """What was being done at each fault, and how many runs ended with another result."""
    lines = ["| fault | stage | what was written | calls | faults | wrong |", "|-|-|-|-|-|-|"]
    groups = defaultdict(list)
    for row in rows:
        groups[row["kind"], *row["call"][:2]].append(row)
    for key, of_key in sorted(groups.items()):
        ops = Counter(row["call"][2] for row in of_key)
        shown = ", ".join(f"{op} {n}" for op, n in sorted(ops.items()))
        wrong = sum(bool(row["wrong"]) for row in of_key)
        lines.append("| " + " | ".join([*key, shown, str(len(of_key)), str(wrong)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    sys.exit(run_main(main, Args))
