# One loop by several processes; scripts/iterate.sh sources this file.
#
# Every process runs the whole loop, and all run each stage together. `once MARK COMMAND…` has process
# 0 do something alone, while the others wait for it. The others end when process 0 writes that it
# failed (RUN/.process_0.failed), or shows no sign of life for PROCESS_TIMEOUT seconds
# (RUN/.process_0.alive, which it renews once a second). All these files, and MARK, name the attempt
# that wrote them, so that leftovers of an earlier command are not taken for this one's.

has_tpu() { compgen -G '/dev/accel*' || compgen -G '/dev/vfio/[0-9]*'; } >/dev/null
has_gpu() { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1

if [[ ${COORDINATOR:-} == auto ]]; then
  place=$(python -m sharding.processes)
  read -r COORDINATOR PROCESSES PROCESS_ID <<<"$place"
  export COORDINATOR PROCESSES PROCESS_ID
fi
attempt="$(hostname).$$.$(date +%s%N)" begun=
if [[ -n ${COORDINATOR:-} && ${PROCESS_ID:-0} != 0 ]]; then
  exec >/dev/null # only process 0 prints
  mkdir -p "${RUNS:-runs}"
  begun=$(mktemp "${RUNS:-runs}/.process_$PROCESS_ID.XXXXXX") # made at the shared disk's time
fi

alone= # while process 0 does something by itself
once() { # MARK COMMAND…: by process 0 alone, which then makes the file MARK
  if [[ -z ${COORDINATOR:-} ]]; then
    "${@:2}"
  elif [[ $PROCESS_ID == 0 ]]; then
    # One worker of a TPU pod cannot use its chips without the other workers.
    alone=yes
    COORDINATOR='' JAX_PLATFORMS=${JAX_PLATFORMS:-$(has_tpu && echo cpu || true)} "${@:2}"
    alone=
    echo "$attempt" >"$1.new" && mv "$1.new" "$1"
  else
    wait_for "$1"
  fi
}

alive=
show_life() { # of process 0, in the background, as long as this shell lives
  [[ -n ${COORDINATOR:-} && $PROCESS_ID == 0 ]] || return 0
  local parent
  mkdir -p "$run"
  while read -r _ _ _ parent _ <"/proc/$BASHPID/stat" && [[ $parent == "$$" ]]; do
    echo "$attempt $SECONDS" >"$run/.process_0.alive.new" &&
      mv "$run/.process_0.alive.new" "$run/.process_0.alive" || true # a full disk ends no sign of life
    sleep 1
  done >/dev/null 2>&1 &
  alive=$!
}

# Contents are compared, not times, since the hosts' clocks differ. The first sign of life may take
# long: process 0 may still be installing packages.
content() { cat "$run/.process_0.$1" 2>/dev/null || true; }
patience=600 living= # the attempt of process 0 that has shown life
wait_for() { # MARK
  local silent=0 before now code by
  before=$(content alive)
  until [[ -n $living && $(cat "$1" 2>/dev/null) == "$living" ]]; do
    sleep 1
    read -r code by <<<"$(content failed)"
    if [[ -n $by && ($by == "$living" || $run/.process_0.failed -nt $begun) ]]; then
      echo "process 0 ended with exit code $code: see its output" >&2
      exit $((code == 2 ? 2 : 75))
    fi
    now=$(content alive)
    if [[ $now != "$before" || (-z $living && $run/.process_0.alive -nt $begun) ]]; then
      before=$now living=${now% *} silent=0 patience=${PROCESS_TIMEOUT:-100}
    elif ((++silent > ${patience%.*})); then
      echo "process 0 has shown no sign of life for $silent seconds" >&2
      exit 75
    fi
  done
}

# A signal to the whole process group stops the stage, which saves its work and ends with 75. A signal
# to this shell alone ends the loop after the stage.
trap 'exit 75' INT TERM USR1
ended() { # the last command
  local code=$?
  if [[ $code == 1 && $1 =~ ^(cp|echo|mkdir|mktemp|mv|rm|sync|tee)' ' ]]; then
    echo "error: ${BASH_REMATCH[1]} failed (its message is above): mend that, and run the same command again" >&2
    code=2
  fi
  case $code in
    130 | 137 | 143) code=75 ;; # a stage was killed, or stopped while it started
    134) # JAX aborts a process when another has died
      [[ -z ${COORDINATOR:-} || -n $alone ]] || { echo "aborted: another process died, or see above" >&2 && code=75; } ;;
  esac
  [[ $code != 75 ]] || echo "stopped: the same command goes on" >&2
  if [[ -n $alive ]]; then
    kill "$alive" 2>/dev/null || true # a signal to the whole group ended it before
    [[ $code == 0 ]] || echo "$code $attempt" >"$run/.process_0.failed"
  fi
  [[ -z $begun ]] || rm -f "$begun"
  exit "$code"
}
trap 'ended "$BASH_COMMAND"' EXIT
