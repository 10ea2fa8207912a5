"""gs:// paths, against a local stand-in of Google's storage API: a server in a process of its own,
as are the stages, one machine's disk apart from another's."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from stages import pairs
from stages.files.run import run_main
from tests import tiny

DIE = """
import os, sys
from stages.files.output import Manifest, Output
manifest = Manifest("sample", {}, {}, {})
output = Output.open(sys.argv[1], manifest)
print(len(output), "there", flush=True)
for i in range(len(output), 4):
    output.write({"prompt_id": str(i)})
    if len(output) == int(sys.argv[2]):
        os._exit(9)
from collections import Counter
output.finish([str(i) for i in range(4)], Counter({"in": 4}))
"""
READ = """
import json, sys
from etils import epath
paths = [epath.Path(path) for path in sys.argv[1:]]
print(json.dumps([path.read_text() if path.is_file() else path.exists() for path in paths]))
"""
COPY = """
import pathlib, sys
from etils import epath
for file in pathlib.Path(sys.argv[1]).rglob("*"):
    if file.is_file():
        target = epath.Path(sys.argv[2]) / file.relative_to(sys.argv[1])
        target.write_bytes(file.read_bytes())
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The environment in which gs://bucket is a bucket of this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = f"http://localhost:{port}"
    log = open(tmp_path_factory.mktemp("server") / "log", "w")
    command = [
        sys.executable,
        "-m",
        "gcp_storage_emulator",
        "start",
        "--in-memory",
        f"--port={port}",
        "--default-bucket=bucket",
    ]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                break
        time.sleep(0.1)
    yield {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs, behind epath
        "FSSPEC_GCS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for buckets' kinds, which it lacks
        "TENSORSTORE_GCS_HTTP_URL": url,  # Orbax's arrays
    }
    process.terminate()
    process.wait()


@pytest.fixture
def on(server, tmp_path):
    """on(MACHINE, ARGUMENTS…): run Python there, that is with a cache folder of its own."""

    def on(machine, *argv, code=0):
        run = subprocess.run(
            [sys.executable, *argv],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | server | {"XDG_CACHE_HOME": str(tmp_path / machine)},
        )
        assert run.returncode == code, run.stderr[-2000:]
        return run.stdout

    return on


def read(on, *paths):
    """The text of each object; of what is none, whether it exists, as a folder."""
    return json.loads(on("here", "-c", READ, *paths))


def write_ranked(path):
    rows = [
        {
            "prompt_id": str(i),
            "prompt": f"Say {i}.",
            "scores": [0.1 * i, 0.5],
            "responses": [{"text": f"an {i}"}, {"text": "so" if i != 3 else ""}],
        }
        for i in range(6)
    ]
    return tiny.write_jsonl(path, rows)


def test_pairs_of_a_bucket_go_into_a_bucket_as_they_do_onto_a_disk(on, tmp_path):
    local = [
        "--ranked",
        write_ranked(tmp_path / "ranked.jsonl"),
        "--test-count",
        "1",
        "--out",
        f"{tmp_path}/pairs.jsonl",
    ]
    assert run_main(pairs.main, pairs.Args, local) == 0
    on("here", "-c", COPY, str(tmp_path), "gs://bucket/run")
    remote = [
        "-m",
        "stages.pairs",
        "--ranked",
        "gs://bucket/run/ranked.jsonl",
        "--test-count",
        "1",
        "--out",
        "gs://bucket/out/pairs.jsonl",
    ]
    on("here", *remote)
    to_parquet = ["-m", "scripts.convert", "to-parquet", "gs://bucket/out/pairs.jsonl"]
    to_parquet += ["gs://bucket/out/dataset", "--split", "train_iteration_1"]
    shown = on("here", *to_parquet)
    assert "train_iteration_1-00000-of-00001.parquet: " in shown
    names = "pairs.jsonl", "pairs.test.jsonl", "pairs.jsonl.set_aside.jsonl"
    *there, manifest = read(
        on,
        *(f"gs://bucket/out/{name}" for name in names),
        "gs://bucket/out/pairs.jsonl.manifest.json",
    )
    assert there == [(tmp_path / name).read_text() for name in names]
    manifest = json.loads(manifest)
    ours = json.loads((tmp_path / "pairs.jsonl.manifest.json").read_text())
    ((theirs, mine),) = zip(manifest.pop("inputs").values(), ours.pop("inputs").values())
    assert theirs["sha256"] == mine["sha256"]
    assert manifest.pop("seconds") is not None is not ours.pop("seconds")
    assert manifest == ours
    assert [p for p in (tmp_path / "here").rglob("*") if p.is_file()] == []  # nothing is left
    assert "finished already" in on("there", *remote)


def test_a_missing_object_is_the_callers_mistake(on):
    argv = ["--ranked", "gs://bucket/nothing.jsonl", "--out", "gs://bucket/x.jsonl"]
    on("here", "-m", "stages.pairs", *argv, code=2)


def test_a_killed_stage_leaves_no_object_and_goes_on_where_its_disk_is(on, tmp_path):
    path = "gs://bucket/killed/out.jsonl"
    on("here", "-c", DIE, path, "2", code=9)
    assert read(on, path) == [False]
    assert "2 there" in on("here", "-c", DIE, path, "3", code=9)
    assert "0 there" in on("there", "-c", DIE, path, "-1")  # another machine knows of nothing
    assert read(on, path)[0].count("\n") == 4
    # What the first machine still holds is forgotten, now that the file is whole.
    finished = on("here", "-c", DIE.replace("print(len", "sys.exit(0); print(len"), path, "-1")
    assert "is finished already" in finished
    assert [p for p in (tmp_path / "here").rglob("*") if p.is_file()] == []


@pytest.mark.heavy
def test_a_training_in_a_bucket_stops_on_one_machine_and_ends_on_another(on, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    tiny.write_checkpoint(disk / "model")
    rows = [
        {"prompt_id": str(i), **row, "chosen": turns(row, "yes"), "rejected": turns(row, "no")}
        for i, row in enumerate(tiny.PROMPTS)
    ]
    tiny.write_jsonl(disk / "pairs.jsonl", rows)
    on("here", "-c", COPY, str(disk), "gs://bucket/train")

    def train(machine, folder, *more, code=0):
        argv = [
            "--checkpoint",
            f"{folder}/model",
            "--pairs",
            f"{folder}/pairs.jsonl",
            "--out",
            f"{folder}/out",
            "--batch-size",
            "2",
            "--micro-batch-size",
            "2",
            "--epochs",
            "2",
            "--learning-rate",
            "1e-3",
            "--save-every",
            "3",
            "--dtype",
            "float32",
        ]
        return on(machine, *more, *argv, code=code)

    train("here", disk, "-m", "stages.dpo")
    # SIGTERM after the fifth step: five are done when it stops, and saved.
    stop = (
        "import os, signal, sys; from stages import dpo; from stages.files.run import run_main\n"
        "from stages.files.work import Work; first = Work.log\n"
        "def log(self, step, values):\n"
        "    if step == 5: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    first(self, step, values)\n"
        "Work.log = log; sys.exit(run_main(dpo.main, dpo.Args, sys.argv[1:]))"
    )
    train("here", "gs://bucket/train", "-c", stop, code=75)
    assert read(on, "gs://bucket/train/out") == [False]
    shown = train("there", "gs://bucket/train", "-m", "stages.dpo")
    assert "going on after step 5 of 8" in shown
    manifest, logged, work = read(
        on,
        "gs://bucket/train/out/manifest.json",
        "gs://bucket/train/out.log/metrics.jsonl",
        "gs://bucket/train/out.work",
    )
    unbroken = json.loads((disk / "out" / "manifest.json").read_text())
    assert json.loads(manifest)["identity"] == unbroken["identity"]
    assert [json.loads(line)["step"] for line in logged.splitlines()] == list(range(1, 9))
    assert work is False
    answers = [
        "--checkpoint",
        "gs://bucket/train/out",
        "--prompts",
        "gs://bucket/train/pairs.jsonl",
    ]
    on(
        "there",
        "-m",
        "stages.sample",
        *answers,
        "--out",
        "gs://bucket/train/samples.jsonl",
        "--n",
        "1",
        "--max-new-tokens",
        "4",
        "--slots",
        "4",
    )
    assert read(on, "gs://bucket/train/samples.jsonl")[0].count("\n") == len(rows)


def turns(row, answer):
    asked = {"role": "user", "content": row["prompt"]}
    return [asked, {"role": "assistant", "content": answer}]
