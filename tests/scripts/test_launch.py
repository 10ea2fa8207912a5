"""The launchers, on a gcloud that works on local folders and an srun that works here; what a linter
says of every shell file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A slice is a folder with its state and a home folder a worker; what would be sent there runs here.
GCLOUD = r"""#!/usr/bin/env bash
set -euo pipefail
echo "$*" >>"$CLOUD/calls"
shift 3
verb=$1 tpu= worker=0 command= files=()
for argument in "${@:2}"; do
  case $argument in
    --worker=*) worker=${argument#*=} ;;
    --command=*) command=${argument#*=} ;;
    --*) ;;
    *) files+=("$argument") ;;
  esac
done
workers=$CLOUD/worker-$worker
[[ $worker != all ]] || workers=$(echo "$CLOUD"/worker-*)
case $verb in
  list) cat "$CLOUD/state" 2>/dev/null || true ;;
  create) mkdir -p "$CLOUD"/worker-{0,1}; echo READY >"$CLOUD/state" ;;
  delete) rm -r "$CLOUD"/worker-* "$CLOUD/state" ;;
  ssh) [[ -f $CLOUD/state ]] || exit 255
    for home in $workers; do
      (cd "$home"; env -i PATH="$PATH" HOME="$home" bash -c "$command")
    done ;;
  scp) to=${files[-1]}; unset 'files[-1]'
    for home in $workers; do
      for file in "${files[@]}"; do cp "${file/#align:/$home/}" "${to/#align:/$home/}"; done
    done ;;
esac
"""

# Gives a gated model's file to those who have a token.
CURL = "#!/bin/sh\ngrep -q hf_mine && echo 200 || echo 401\n"

# An interpreter that makes itself an environment, and notes what it is asked to install. `python -`
# finds jax.py in the folder that it is called in.
PYTHON = f"""#!/bin/bash
case $* in
  "-m venv .venv") mkdir .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip"*) echo "$*" >>asked ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
JAX = """import os, types
__version__, devices, default_backend = "0", list, lambda: os.environ["FINDS"]
config = types.SimpleNamespace(jax_platforms=os.environ.get("JAX_PLATFORMS"))
"""
# nvidia-smi of a machine with a GPU, and of one without.
SMI = "#!/bin/sh\n[ $1 = -L ] || echo $DRIVER\n"
NO_SMI = "#!/bin/sh\nexit 9\n"
# In place of bash's own: whether this machine has a TPU.
TPU = {"BASH_FUNC_compgen%%": "() { true; }"}
NO_TPU = {"BASH_FUNC_compgen%%": "() { false; }"}


def stub(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def script(name: str, *arguments: str, cwd: Path = ROOT, **environment):
    inherited = {name: os.environ[name] for name in ("PATH", "HOME")}
    return subprocess.run(
        ["bash", f"scripts/{name}", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=inherited | environment,
        timeout=120,
    )


@pytest.fixture
def tree(tmp_path):
    """The scripts in a git folder of their own, to put another loop in."""
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT / "scripts", tree / "scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    subprocess.run(["git", "init", "-q", tree], check=True)
    return tree


def test_no_shell_file_has_what_a_linter_warns_of():
    scripts = [*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci" / "run"]
    # Files that are sourced (SC1090) are read by who sources them (SC2034, SC2154); A= B= is meant
    # (SC1007), and so is splitting a list of flags (SC2046).
    subprocess.run(
        [
            Path(sys.executable).with_name("shellcheck"),
            "--shell=bash",
            "--severity=warning",
            "--exclude=SC1007,SC1090,SC2034,SC2046,SC2154",
            *scripts,
        ],
        check=True,
    )


@pytest.mark.parametrize(
    "kind,version,machine,several",
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite", "v5e-16", True),
        ("v5p-8", "v2-alpha-tpuv5", "v5p-8", False),
        ("v6e-8", "v2-alpha-tpuv6e", "v6e-8", False),
        ("v5p-16", "v2-alpha-tpuv5", "", True),  # v5p-8's mesh would not cover it
    ],
)
def test_a_dry_run_shows_the_commands_for_a_slice(tmp_path, kind, version, machine, several):
    cloud = tmp_path / "calls"
    stub(tmp_path / "bin", "gcloud", f"#!/bin/sh\ntouch {cloud}\n")
    shown = script(
        "tpu_pod.sh",
        "--dry-run",
        TYPE=kind,
        ZONE="z",
        SHARE="10.0.0.2:/runs",
        SPOT="1",
        LIMIT="64",
        VARIANT="2024",
        RANKER="/mnt/runs/PairRM",
        SLOTS="8",  # which the recipe does not take from the environment
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
    )
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    gcloud = "gcloud compute tpus tpu-vm"
    on_all = f"{gcloud} ssh align --worker=all '--command=bash tpu_worker.sh"
    name = "snorkel-mistral-7b"
    settings = f"RUNS=/mnt/runs NAME={name}-2024" + " COORDINATOR=auto" * several
    settings += " VARIANT=2024 LIMIT=64 RANKER=/mnt/runs/PairRM SAVE_EVERY=25"
    for line in (
        f"{gcloud} create align --accelerator-type={kind} --version={version} --spot --zone=z",
        f"{on_all} setup 10.0.0.2:/runs' --zone=z",
        f"{on_all} run {' '.join(filter(None, (settings, name, machine)))}' --zone=z",
        f"{gcloud} ssh align --worker=0 '--command=bash tpu_worker.sh log' --zone=z",
    ):
        assert line in lines
    assert not cloud.exists()  # nothing was run


@pytest.mark.parametrize(
    "arguments,environment,said",
    [
        ((), {}, "v5litepod-16 has several hosts"),
        (("fly",), {}, "no step fly"),
        ((), {"TYPE": "v9-8"}, "TYPE=v9-8"),
        ((), {"SHARE": "gs://bucket"}, "SHARE=gs://bucket"),
        ((), {"TYPE": "v6e-8", "RECIPE": "nothing"}, "RECIPE=nothing"),
        ((), {"TYPE": "v6e-8", "MACHINE": "v9"}, "MACHINE=v9"),
    ],
)
def test_what_cannot_be_launched_is_refused_in_one_line(arguments, environment, said):
    refused = script("tpu_pod.sh", "--dry-run", *arguments, **environment)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and said in refused.stderr


def test_a_gated_model_is_refused_before_a_slice_is_paid_for(tmp_path):
    stub(tmp_path / "bin", "gcloud", f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\n')
    stub(tmp_path / "bin", "curl", CURL)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TYPE": "v5p-8"}
    refused = script("tpu_pod.sh", "create", **environment)
    assert refused.returncode == 2 and "accept the terms at https://" in refused.stderr
    assert not (tmp_path / "calls").exists()
    assert script("tpu_pod.sh", "create", **environment, HF_TOKEN="hf_mine").returncode == 0
    assert " create align " in (tmp_path / "calls").read_text()


def test_a_slice_is_made_runs_on_every_worker_is_preempted_and_goes_on(tree, tmp_path):
    cloud = tmp_path / "cloud"
    cloud.mkdir()
    stub(tmp_path / "bin", "gcloud", GCLOUD)
    stub(tmp_path / "bin", "curl", CURL)
    runs = "mkdir -p $RUNS/$NAME && cd $RUNS/$NAME && mkdir -p start/checkpoint final-hf"
    (tree / "scripts" / "iterate.sh").write_text(
        f"{runs}; echo $* $SEED $HF_TOKEN >>told; echo loop $1; sleep 1"
    )
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "CLOUD": str(cloud),
        "TYPE": "v5p-8",
        "SEED": "7",
        "HF_TOKEN": "hf_mine",
        "TMPDIR": str(tmp_path),
    }
    # No SHARE: the runs lie on the worker. `setup` installs a Python, so it is left out here.
    steps = ("create", "copy", "run", "log", "fetch")
    done = script("tpu_pod.sh", *steps, cwd=tree, **environment)
    assert done.returncode == 0, done.stderr
    assert "loop snorkel-mistral-7b" in done.stdout
    name = "snorkel-mistral-7b-seed7"
    for worker in (0, 1):
        told = cloud / f"worker-{worker}" / "align" / "runs" / name / "told"
        assert told.read_text() == "snorkel-mistral-7b v5p-8 7 hf_mine\n"
        assert (cloud / f"worker-{worker}" / ".align_token").stat().st_mode & 0o77 == 0
    assert "hf_mine" not in (cloud / "calls").read_text()  # no command line has the token
    assert not list(tmp_path.glob("tmp.*"))
    fetched = tree / "runs" / name
    assert sorted(p.name for p in fetched.rglob("*")) == ["final-hf", "start", "told"]

    # While a run goes on, nothing of it is touched, and its exit code comes back.
    (tree / "scripts" / "iterate.sh").write_text("echo other; sleep 4; exit 2")
    first = script("tpu_pod.sh", "copy", "run", cwd=tree, **environment)
    assert first.returncode == 0
    again = script("tpu_pod.sh", "copy", "run", "log", cwd=tree, **environment)
    assert again.returncode == 2 and again.stdout.count("a run is going on") == 4

    # `stop` reaches the stage and the loop.
    (tree / "scripts" / "iterate.sh").write_text("trap 'exit 75' TERM; sleep 60; echo never")
    script("tpu_pod.sh", "copy", "run", cwd=tree, **environment)
    stopped = script("tpu_pod.sh", "stop", "log", cwd=tree, **environment)
    assert stopped.returncode == 75 and "never" not in stopped.stdout

    # A slice that was taken away: said, and made anew by the same command.
    script("tpu_pod.sh", "run", cwd=tree, **environment)
    script("tpu_pod.sh", "stop", cwd=tree, **environment)
    (cloud / "state").write_text("PREEMPTED\n")
    gone = script("tpu_pod.sh", "log", cwd=tree, **environment)
    assert gone.returncode == 75 and "align is PREEMPTED" in gone.stderr
    made = script("tpu_pod.sh", "create", "copy", cwd=tree, **environment)
    assert made.returncode == 0 and "made anew" in made.stdout
    assert (cloud / "state").read_text() == "READY\n"


@pytest.fixture
def bare(tree, tmp_path):
    """(tree, environment) for scripts/setup.sh: on a machine with a GPU, and nothing installed."""
    shutil.copy(ROOT / "requirements.txt", tree)
    (tree / "jax.py").write_text(JAX)
    stub(tmp_path / "bin", "python", PYTHON)
    stub(tmp_path / "bin", "nvidia-smi", SMI)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    return tree, NO_TPU | {"PATH": path, "PYTHON": "python", "DRIVER": "580.65", "FINDS": "gpu"}


@pytest.mark.parametrize(
    "flag,environment,jax,torch",
    [
        ("", {"DRIVER": "575.57"}, "jax[cuda12]", False),
        ("", {"DRIVER": "580.65"}, "jax[cuda13]", False),
        ("--torch", {"DRIVER": "580.65"}, "jax[cuda13]", True),
        ("", TPU | {"FINDS": "tpu"}, "jax[tpu]", False),
        ("", {"FINDS": "cpu"}, "jax", True),
    ],
)
def test_setup_installs_jax_for_the_accelerator_and_torch_where_it_is_used(
    bare, tmp_path, flag, environment, jax, torch
):
    tree, common = bare
    if environment == {"FINDS": "cpu"}:
        stub(tmp_path / "bin", "nvidia-smi", NO_SMI)
    for _ in range(2):  # the second time nothing is left to do
        done = script("setup.sh", *filter(None, [flag]), cwd=tree, **common | environment)
        assert done.returncode == 0, done.stderr
    first, model = (tree / "asked").read_text().splitlines()
    assert first.endswith(f"-r .venv/requirements.txt {jax}") and "--no-deps" in model
    wanted = (tree / "requirements.txt").read_text().splitlines(keepends=True)
    left_out = [] if torch else [x for x in wanted if x.startswith(("torch==", "llm-blender=="))]
    assert len(left_out) == (0 if torch else 2)
    installed = (tree / ".venv/requirements.txt").read_text()
    assert installed == "".join(x for x in wanted if x not in left_out)


def test_setup_fails_where_jax_sees_no_accelerator_until_it_does(bare):
    tree, environment = bare
    for _ in range(2):
        failed = script("setup.sh", cwd=tree, **environment | {"FINDS": "cpu"})
        assert failed.returncode == 1
        assert "jax[cuda13] is installed and sees no accelerator" in failed.stderr
    assert (tree / ".venv/installed").read_text() == ""
    meant = script("setup.sh", cwd=tree, **environment | {"FINDS": "cpu", "JAX_PLATFORMS": "cpu"})
    assert meant.returncode == 0 and len((tree / ".venv/installed").read_text().split()) == 2


@pytest.mark.parametrize(
    "smi,environment,tuned",
    [(NO_SMI, NO_TPU, True), (SMI, NO_TPU, False), (NO_SMI, TPU, False)],
    ids=["cpu", "gpu", "tpu"],
)
def test_the_loop_has_a_cache_of_programs_and_on_a_cpu_alone_settings_for_malloc(
    tmp_path, smi, environment, tuned
):
    stub(tmp_path / "bin", "nvidia-smi", smi)
    recipe = "echo run=$RUNS/x NAME=x SEED=0 ITERATIONS=1 'PROMPTS_0=(p)'"
    stage = "echo $JAX_COMPILATION_CACHE_DIR ${GLIBC_TUNABLES:-none} >$RUNS/told; exit 2"
    stub(tmp_path / "bin", "python", f"#!/bin/bash\n[[ $2 != *.recipe ]] || exec {recipe}\n{stage}")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    environment = environment | {"PATH": path, "PYTHON": "python", "RUNS": str(tmp_path / "runs")}
    (tmp_path / "runs").mkdir()
    assert script("iterate.sh", **environment).returncode == 2
    cache, malloc = (tmp_path / "runs" / "told").read_text().split()
    assert cache == f"{tmp_path}/runs/.compiled"
    assert malloc.startswith("glibc.malloc." if tuned else "none")


def test_a_slurm_job_saves_at_its_time_limit_and_goes_back_into_the_queue(tree, tmp_path):
    (tree / "scripts" / "iterate.sh").write_text(
        "trap 'kill $!; exit 75' TERM; echo $* $COORDINATOR $PROCESSES $PROCESS_ID"
        " ${SLURM_LOCALID:-none}; echo >started; sleep 30 & wait"
    )
    bin_ = tmp_path / "bin"
    stub(bin_, "srun", '#!/bin/bash\nshift 2\nexport SLURM_PROCID=1 SLURM_LOCALID=0\nexec "$@"\n')
    stub(bin_, "scancel", f"#!/bin/bash\necho $* >>{tmp_path}/told\npkill -TERM -P $PPID bash\n")
    stub(bin_, "scontrol", f"#!/bin/bash\necho $* >>{tmp_path}/told\necho node3\necho node4\n")
    environment = {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": "123456",
        "SLURM_SUBMIT_DIR": str(tree),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[3-4]",
    }
    job = subprocess.Popen(
        ["bash", ROOT / "scripts" / "slurm.sh", "mine.toml", "a"],
        stdout=subprocess.PIPE,
        env=os.environ | environment,
        text=True,
    )
    while not (tree / "started").exists():
        assert job.poll() is None
    job.send_signal(subprocess.signal.SIGUSR1)
    shown = job.communicate(timeout=60)[0]
    assert job.returncode == 75
    assert shown.splitlines()[0] == "mine.toml a node3:23456 2 1 none"
    assert (tmp_path / "told").read_text().splitlines() == [
        "show hostnames node[3-4]",
        "--signal=TERM 123456.0",
        "requeue 123456",
    ]


def worker(home: Path, *arguments: str, **environment):
    return subprocess.run(
        ["bash", "tpu_worker.sh", *arguments],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=20,
        env={"PATH": os.environ["PATH"], "HOME": str(home)} | environment,
    )


@pytest.mark.parametrize("pid", [None, "1", ""])
def test_a_worker_that_finds_a_run_begun_meanwhile_leaves_it(tmp_path, pid):
    shutil.copy(ROOT / "scripts" / "tpu_worker.sh", tmp_path)
    if pid is not None:
        (tmp_path / "align.pid").write_text(pid)
        os.utime(tmp_path / "align.pid", (1, 1))
    (tmp_path / "align.code").write_text("0\n")
    # The lock is free when it is looked at, and taken when the run is to begin.
    stub(tmp_path / "bin", "flock", '#!/bin/sh\n[ "$3" = true ]\n')
    done = worker(tmp_path, "run", "demo", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 0 and "another run has just begun" in done.stdout
    assert (tmp_path / "align.code").read_text() == "0\n"


@pytest.mark.parametrize("code,gives", [(0, "0"), (2, "2"), (75, "75"), (137, "75"), (143, "75")])
def test_a_worker_notes_how_its_loop_ended(tmp_path, code, gives):
    shutil.copy(ROOT / "scripts" / "tpu_worker.sh", tmp_path)
    (tmp_path / "align" / "scripts").mkdir(parents=True)
    (tmp_path / "align" / "scripts" / "iterate.sh").write_text(f"exit {code}")
    (tmp_path / "align.pid").write_text("1\n")  # of an earlier run
    assert worker(tmp_path, "run", "demo").returncode == 0
    assert worker(tmp_path, "log").returncode == int(gives)
    assert (tmp_path / "align.code").read_text() == f"{gives}\n"


def test_a_log_of_a_run_that_was_killed_says_that_it_goes_on(tmp_path):
    shutil.copy(ROOT / "scripts" / "tpu_worker.sh", tmp_path)
    done = worker(tmp_path, "log")
    assert done.returncode == 75 and "died without a word: start it again" in done.stderr


def test_a_slurm_script_outside_a_job_is_refused():
    refused = script("slurm.sh")
    assert refused.returncode == 2 and "sbatch scripts/slurm.sh" in refused.stderr


@pytest.mark.parametrize("code", [134, 137, 143])
def test_a_slurm_job_whose_process_was_killed_can_go_on(tree, tmp_path, code):
    (tree / "scripts" / "iterate.sh").write_text(f"echo $*; exit {code}")
    stub(tmp_path / "bin", "srun", '#!/bin/bash\nshift 2\nexec "$@"\n')
    job = subprocess.run(
        ["bash", ROOT / "scripts" / "slurm.sh"],
        capture_output=True,
        text=True,
        env=os.environ
        | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": sys.executable}
        | {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tree), "SLURM_JOB_NUM_NODES": "1"},
    )
    assert (job.returncode, job.stdout) == (75, "snorkel-mistral-7b gpu-8x80gb\n")
    assert "the same job again" in job.stderr
