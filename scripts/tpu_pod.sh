#!/usr/bin/env bash
# Run a recipe on a Cloud TPU slice, from your own machine:
#
#   bash scripts/tpu_pod.sh [--dry-run] [STEP…]
#
# The same command goes on after any interruption. The steps (default: create copy setup run log fetch):
#   create   make the slice; an existing one is used, a preempted one is made anew
#   copy     this tree to every worker (what git knows and does not ignore)
#   setup    Python and the packages on every worker, SHARE mounted
#   run      start scripts/iterate.sh on every worker, in the background: it outlives your connection
#   log      follow worker 0's log to the end; its exit code is this script's
#   fetch    the run's files to runs/NAME/ here: all but checkpoints, the last model included
#   stop     end the run after its work is saved; status: print the slice's state; delete: delete it
# --dry-run prints each command, exactly, and runs none.
#
# Environment:
#   TYPE=v5litepod-16   or v5p-8, v6e-8, …; ZONE=… one that has it (gcloud's own default otherwise)
#   TPU=align           the slice's name
#   PROJECT=            gcloud's default otherwise
#   SPOT=1              a preemptible slice: a fraction of the price; SHARE keeps what is done
#   VERSION=            the VM's software version; default: the one for TYPE
#   SHARE=IP:/NAME      an NFS share (Filestore) for the runs, mounted on every worker
#   RECIPE=             default: snorkel-mistral-7b
#   MACHINE=            a [machine.NAME] of the recipe; default: the one for TYPE, where it has one
#   NAME VARIANT SEED LIMIT and the variables of the recipe's [from_environment]
#
# SHARE is required where a slice has several hosts. The workers of a slice share no disk; each
# worker's has 100 GB where a 7B run needs 300, and a preempted worker loses it. It is NFS and no bucket:
# stages append to files, lock and rename them, so a preemption costs minutes; a bucket would hold only
# finished files. Make it once, in the slice's zone and network:
#   gcloud filestore instances create align --zone=ZONE --tier=BASIC_SSD \
#     --file-share=name=runs,capacity=2560GiB --network=name=default    → SHARE=ITS_IP:/runs
# For a gated model such as Mistral's, accept its terms on the hub and set HF_TOKEN, which `copy` puts
# into a file on each worker that you alone can read. Or put the model's folder on the share and name it
# by MODEL=/mnt/runs/…. With several workers, call `ssh-add ~/.ssh/google_compute_engine` first.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "error: $*" >&2; exit 2; }

dry=
[[ ${1:-} == --dry-run ]] && { dry=1; shift; }
steps=("$@")
((${#steps[@]})) || steps=(create copy setup run log fetch)
for step in "${steps[@]}"; do
  [[ $step =~ ^(create|copy|setup|run|log|fetch|stop|status|delete)$ ]] ||
    fail "no step $step: create copy setup run log fetch, stop status delete"
done

TYPE=${TYPE:-v5litepod-16} TPU=${TPU:-align}
# TYPE counts chips (for v5p cores, 8 per host). Sources: cloud.google.com/tpu/docs/v5e, /v5p,
# /v6e for the types, /tpu/docs/runtimes for the software.
[[ $TYPE =~ ^(v5litepod|v5p|v6e)-([0-9]+)$ ]] || fail "TYPE=$TYPE: v5litepod-N, v5p-N or v6e-N"
case ${BASH_REMATCH[1]} in
  v5litepod) version=v2-alpha-tpuv5-lite ;;
  v5p) version=v2-alpha-tpuv5 ;;
  v6e) version=v2-alpha-tpuv6e ;;
esac
machine=${TYPE/litepod/e}
hosts=1
((BASH_REMATCH[2] <= 8)) || hosts=several
[[ $hosts == 1 || -n ${SHARE:-} ]] ||
  fail "SHARE is not set: $TYPE has several hosts, which need one file system; give SHARE=IP:/NAME"
[[ -z ${SHARE:-} || $SHARE =~ ^[A-Za-z0-9.-]+:/[A-Za-z0-9][A-Za-z0-9._/-]*$ ]] ||
  fail "SHARE=$SHARE: give an NFS share as IP:/NAME"
VERSION=${VERSION:-$version} RECIPE=${RECIPE:-snorkel-mistral-7b}
file=$RECIPE
[[ -f $file ]] || file=scripts/recipes/$RECIPE.toml
[[ -f $file ]] || fail "RECIPE=$RECIPE: no such recipe"
MACHINE=${MACHINE-$(grep -oP "^\[machine\.\K$machine(?=\])" "$file" || true)}
[[ -z $MACHINE ]] || grep -qF "[machine.$MACHINE]" "$file" || fail "MACHINE=$MACHINE: not in $file"
[[ ${SEED:-0} == 0 ]] && seed= || seed=-seed$SEED
NAME=${NAME:-$(basename "$RECIPE" .toml)${VARIANT:+-$VARIANT}$seed}
[[ -z ${SPOT:-} ]] || SAVE_EVERY=${SAVE_EVERY:-25} # a preemption leaves 30 s, less than a save takes
variables=$(sed -n '/^\[from_environment\]/,/^\[/s/^\([A-Za-z0-9_]*\) *=.*/\1/p' "$file")
runs=runs
[[ -z ${SHARE:-} ]] || runs=/mnt/runs
[[ -n $dry ]] || command -v gcloud >/dev/null || fail "no gcloud here: cloud.google.com/sdk/docs/install"

shown() { # COMMAND…: as one could type it
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  echo "${line% }"
}
do_() { # COMMAND…
  if [[ -n $dry ]]; then shown "$@"; else "$@"; fi
}
tpu() { # VERB ARGUMENTS…
  local verb=$1
  shift
  do_ gcloud compute tpus tpu-vm "$verb" "$@" ${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"}
}
on() { # WORKER ARGUMENTS…: runs tpu_worker.sh there
  tpu ssh "$TPU" --worker="$1" --command="bash tpu_worker.sh $(shown "${@:2}")"
}
state() { # READY, PREEMPTED, …; nothing where there is no slice
  dry='' tpu list --filter="name~/$TPU\$" --format='value(state)'
}

may_download() { # checks, before a slice is paid for, that the hub gives this token the model
  local id status
  id=${MODEL:-$(sed -n 's/^model *= *"\(.*\)".*/\1/p' "$file")}
  [[ $id =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+$ ]] && command -v curl >/dev/null || return 0
  status=$(curl -s -o /dev/null -w '%{http_code}' -K - "https://huggingface.co/$id/resolve/main/config.json" \
    <<<"${HF_TOKEN:+header = \"Authorization: Bearer $HF_TOKEN\"}" || true)
  [[ $status != 40[13] ]] ||
    fail "the hub does not give $id: accept the terms at https://huggingface.co/$id and set HF_TOKEN"
}
create() {
  local there=
  [[ -n $dry ]] || may_download
  if [[ -n $dry ]]; then
    tpu list --filter="name~/$TPU\$" --format='value(state)'
  else
    there=$(state)
  fi
  case $there in
    READY) echo "$TPU is there already"; return ;;
    PREEMPTED | TERMINATED | STOPPED)
      echo "$TPU was $there: it is made anew, and the run goes on from ${SHARE:-the start}"
      tpu delete "$TPU" --quiet ;;
    '') ;;
    *) echo "$TPU is $there: run the same command again when it is ready" >&2; exit 75 ;;
  esac
  tpu create "$TPU" --accelerator-type="$TYPE" --version="$VERSION" ${SPOT:+--spot}
}
copy() {
  local file=${TMPDIR:-/tmp}/align.tgz
  do_ bash -c 'git ls-files -z -co --exclude-standard | tar -czf "$0" --null -T -' "$file"
  tpu scp "$file" scripts/tpu_worker.sh "$TPU:" --worker=all
  on all copy
  if [[ -n ${HF_TOKEN:-} ]]; then # as a file: a command line can be read by all who use the machine
    token=$(mktemp)
    trap 'rm -f "$token"' EXIT
    echo "$HF_TOKEN" >"$token"
    tpu scp "$token" "$TPU:.align_token" --worker=all
  fi
}
setup() { on all setup ${SHARE:+"$SHARE"}; }
run() {
  local variable settings=("RUNS=$runs" "NAME=$NAME")
  [[ $hosts == 1 ]] || settings+=(COORDINATOR=auto)
  for variable in VARIANT SEED LIMIT $variables; do
    [[ -z ${!variable:-} ]] || settings+=("$variable=${!variable}")
  done
  on all run "${settings[@]}" "$RECIPE" ${MACHINE:+"$MACHINE"}
}
log() {
  local code=0 now
  on 0 log || code=$?
  ((code)) || return 0
  now=$(state)
  if [[ $now != READY ]]; then
    echo "$TPU is ${now:-gone}: the same command makes it anew and goes on from ${SHARE:-the start}" >&2
    exit 75
  fi
  exit "$code"
}
fetch() {
  local from=align/$runs file=align.out.tgz
  [[ -z ${SHARE:-} ]] || from=$runs
  local pack=(tar -C "$from" -czf "$file" --exclude=checkpoint "--exclude=*.work" "--exclude=*.partial*" "$NAME")
  tpu ssh "$TPU" --worker=0 --command="$(shown "${pack[@]}")"
  tpu scp "$TPU:$file" "${TMPDIR:-/tmp}/$file" --worker=0
  do_ mkdir -p runs
  do_ tar -xzf "${TMPDIR:-/tmp}/$file" -C runs
}
stop() { on all stop; }
status() { tpu describe "$TPU" --format='value(state,acceleratorType)'; }
delete() { tpu delete "$TPU" --quiet; }

for step in "${steps[@]}"; do
  echo "== $step" >&2
  "$step"
done
