# One loop by several processes; scripts/iterate.sh sources this file.
#
# Every process runs the whole loop, and the stages by all together. What process 0 does alone the
# others wait for: `once MARK COMMAND…`. They end where process 0 writes that it failed
# (RUN/.process_0.failed: its exit code, and when), or shows no sign of life for PROCESS_TIMEOUT
# seconds (RUN/.process_0.alive: a count that it renews once a second).

has_tpu() { compgen -G '/dev/accel*' || compgen -G '/dev/vfio/[0-9]*'; } >/dev/null
has_gpu() { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1

if [[ ${COORDINATOR:-} == auto ]]; then
  place=$(python -m sharding.processes)
  read -r COORDINATOR PROCESSES PROCESS_ID <<<"$place"
  export COORDINATOR PROCESSES PROCESS_ID
fi
[[ -z ${COORDINATOR:-} || ${PROCESS_ID:-0} == 0 ]] || exec >/dev/null # process 0 tells

once() { # MARK COMMAND…: by process 0 alone, which then makes the file MARK
  if [[ -z ${COORDINATOR:-} ]]; then
    "${@:2}"
  elif [[ $PROCESS_ID == 0 ]]; then
    show_life
    # One worker of a TPU pod cannot use its chips without the others.
    COORDINATOR='' JAX_PLATFORMS=${JAX_PLATFORMS:-$(has_tpu && echo cpu || true)} "${@:2}"
    touch "$1"
  else
    wait_for "$1"
  fi
}

alive=
show_life() { # in the background, as long as this shell lives
  [[ -z $alive ]] || return 0
  local parent
  while read -r _ _ _ parent _ <"/proc/$BASHPID/stat" && [[ $parent == "$$" ]]; do
    echo "$BASHPID $SECONDS" >"$run/.process_0.alive.new"
    mv "$run/.process_0.alive.new" "$run/.process_0.alive"
    sleep 1
  done >/dev/null 2>&1 &
  alive=$!
}

# Contents are compared and not times: the hosts' clocks differ. Until the first sign of life
# process 0 may still be installing packages.
content() { cat "$run/.process_0.$1" 2>/dev/null || true; }
patience=600
wait_for() { # MARK
  local silent=0 before now
  failed=${failed-$(content failed)} # by an earlier command
  before=$(content alive)
  until [[ -e $1 ]]; do
    sleep 1
    now=$(content failed)
    if [[ -n $now && $now != "$failed" ]]; then
      echo "process 0 ended with exit code ${now%% *}: it said why" >&2
      exit "${now%% *}"
    fi
    now=$(content alive)
    if [[ $now != "$before" ]]; then
      before=$now silent=0 patience=${PROCESS_TIMEOUT:-100}
    elif ((++silent > ${patience%.*})); then
      echo "process 0 has shown no sign of life for $silent seconds" >&2
      exit 75
    fi
  done
}

# A signal to the whole group stops the stage, which saves its work and gives 75; one to this shell
# alone stops after the stage. JAX aborts a process (134) when another one died.
trap 'exit 75' INT TERM USR1
ended() {
  local code=$?
  if [[ $code == 134 && -n ${COORDINATOR:-} ]]; then
    echo "another process ended: run the same command again, on all, to go on" >&2
    code=75
  elif [[ $code == 75 ]]; then
    echo "stopped: the same command goes on" >&2
  fi
  if [[ -n $alive ]]; then
    kill "$alive"
    [[ $code == 0 ]] || echo "$code $(date +%s.%N)" >"$run/.process_0.failed"
  fi
  exit "$code"
}
trap ended EXIT
