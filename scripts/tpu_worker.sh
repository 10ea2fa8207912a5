#!/usr/bin/env bash
# What scripts/tpu_pod.sh runs on each worker of a slice, in its home folder:
#
#   bash tpu_worker.sh copy                   unpack align.tgz to align/
#   bash tpu_worker.sh setup [IP:/SHARE]      mount the share at /mnt/runs; Python and the packages
#   bash tpu_worker.sh run SETTING=… RECIPE [MACHINE]   start the loop in the background
#   bash tpu_worker.sh log                    follow it to its end, and end with its exit code
#   bash tpu_worker.sh stop                   end it after its work is saved
#
# Files beside align/: align.lock, held while the loop runs (copy, setup and run do nothing then);
# align.asked, whose time is that of the last `run`; align.log; align.pid, the loop's process group;
# align.code, its exit code.
set -euo pipefail
cd ~

copy() { mkdir -p align && tar -xzf align.tgz -C align; }
setup() { # [IP:/SHARE]
  if [[ -n ${1:-} ]] && ! mountpoint -q /mnt/runs; then
    sudo apt-get -o DPkg::Lock::Timeout=600 install -y -q nfs-common
    sudo mkdir -p /mnt/runs
    # The workers wait for each other's files, so NFS must not remember that one was missing.
    sudo mount -t nfs -o lookupcache=positive "$1" /mnt/runs
    sudo chmod a+rwx /mnt/runs
  fi
  # The VM's own Python is 3.10; uv brings another.
  python3 -m pip install --user --quiet uv
  PATH=~/.local/bin:$PATH
  uv python install --quiet 3.11
  PYTHON=$(uv python find 3.11) bash align/scripts/setup.sh
}
run() { # SETTING=… RECIPE [MACHINE]
  touch align.asked
  nohup flock --nonblock align.lock setsid --wait bash tpu_worker.sh loop "$@" </dev/null >>align.log 2>&1 &
  while [[ ! -f align.pid || align.asked -nt align.pid ]]; do
    kill -0 $! 2>/dev/null || { echo "$(hostname): another run has just begun: left as it is"; return; }
    sleep 0.1
  done
}
loop() { # arguments as `run`; leads its process group, and survives a signal to write the exit code
  local code=0
  trap : TERM
  rm -f align.code
  echo $$ >align.pid
  local settings=(PYTHON=.venv/bin/python)
  [[ ! -f .align_token ]] || HF_TOKEN=$(<.align_token)
  [[ -z ${HF_TOKEN:-} ]] || export HF_TOKEN
  while [[ $1 == *=* ]]; do
    settings+=("$1")
    shift
  done
  (cd align && exec env "${settings[@]}" bash scripts/iterate.sh "$@") || code=$?
  ((code <= 128)) || code=75 # the loop was killed: the same command goes on
  echo "$code" >align.code
}
idle() { touch align.lock && flock --nonblock align.lock true; }
log() {
  touch align.log
  tail -n 40 -f align.log &
  tail=$!
  trap 'kill $tail' EXIT
  while ! idle; do sleep 1; done
  sleep 1 # for tail
  [[ -f align.code ]] || { echo "the run died without a word: start it again" >&2; exit 75; }
  exit "$(<align.code)"
}

# Read whole before it runs: a newer copy may replace this file while the loop goes on.
{
  if [[ ${1:-} =~ ^(copy|setup|run)$ ]] && ! idle; then
    echo "$(hostname): a run is going on: left as it is"
    exit
  fi
  case ${1:-} in
    copy) copy ;;
    setup) setup "${@:2}" ;;
    run) run "${@:2}" ;;
    loop) loop "${@:2}" ;;
    log) log ;;
    stop) kill -TERM -- "-$(<align.pid)" ;;
    *) sed -n 4,8p "$0" >&2; exit 2 ;;
  esac
  exit
}
