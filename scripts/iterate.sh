#!/usr/bin/env bash
# Iterative preference alignment: sample → rank → pairs → dpo, each iteration from the last model.
#
#   bash scripts/iterate.sh [RECIPE]      demo (default), snorkel-mistral-7b, or a file of your own
#
# Run it again after any interruption: it goes on where it was. Environment:
#   NAME=demo    the run is kept under RUNS/NAME/ (default: the recipe's name, and the seed if not 0)
#   SEED=0       of sampling and of the order of the pairs
#   LIMIT=64     take only so many prompts a slice: a smoke run of any recipe
#   RUNS=runs    where the runs are kept, e.g. a folder of a file system that several hosts share
#   PYTHON=…     an interpreter that has everything installed: skips the set-up of .venv
#   COORDINATOR=HOST:PORT PROCESSES=4 PROCESS_ID=0 … 3   one loop by several processes, this command
#                with its number in each, on a file system that all see; COORDINATOR=auto on TPU pods
set -euo pipefail
cd "$(dirname "$0")/.."

recipe=${1:-demo}
file=$recipe
[[ -f $file ]] || file=scripts/recipes/$recipe.sh
if [[ ! -f $file ]]; then
  echo "error: no recipe $recipe: scripts/recipes/ has $(cd scripts/recipes && echo *.sh)" >&2
  exit 2
fi
SEED=${SEED:-0} LIMIT=${LIMIT:-0}
numbers=(SEED LIMIT)
if [[ ${COORDINATOR:-auto} != auto ]]; then
  PROCESSES=${PROCESSES:-} PROCESS_ID=${PROCESS_ID:-}
  numbers+=(PROCESSES PROCESS_ID)
fi
for number in "${numbers[@]}"; do
  [[ ${!number} =~ ^[0-9]+$ ]] || { echo "error: $number=${!number} is no whole number" >&2; exit 2; }
done
NAME=${NAME:-$(basename "$recipe" .sh)$([[ $SEED == 0 ]] || echo "-seed$SEED")}
run=${RUNS:-runs}/$NAME

if [[ -z ${PYTHON:-} ]]; then
  exec {lock}>>scripts/setup.sh # of processes in one folder one sets up, the others find it done
  flock "$lock"
  bash scripts/setup.sh
  exec {lock}>&-
  PYTHON=.venv/bin/python
fi
python() { command "$PYTHON" "$@"; }
if [[ ${COORDINATOR:-} == auto ]]; then
  place=$(python -m sharding.processes)
  read -r COORDINATOR PROCESSES PROCESS_ID <<<"$place"
  export COORDINATOR PROCESSES PROCESS_ID
fi
[[ ${PROCESS_ID:-0} == 0 ]] || exec >/dev/null # process 0 tells
# Each length is compiled once for the whole run, not once a stage; the many small programs as well,
# which together cost every stage several seconds.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/.compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
# On CPU, XLA asks malloc anew for its buffers at every call: memory that goes back to the system
# between two calls, or lies in another thread's arena, costs a tenth of a training step, small pages
# another tenth.
keep_memory=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000:glibc.malloc.arena_max=1
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:$keep_memory}
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

HELDOUT_SAMPLE= EXPORT_DTYPE= RANK= PAIRS= KL= SETTINGS=
source "$file"

# One run, one set of settings: what is there must have been made by these.
mkdir -p "$run"
settings="seed $SEED limit $LIMIT $SETTINGS recipe $(sha256sum <"$file" | cut -c1-16)"
if [[ -f $run/settings && $(<"$run/settings") != "$settings" ]]; then
  echo "error: $run was begun with other settings ($(<"$run/settings"); now $settings):" \
    "choose another NAME, or remove $run" >&2
  exit 2
fi
echo "$settings" >"$run/settings.${PROCESS_ID:-0}"
mv "$run/settings.${PROCESS_ID:-0}" "$run/settings" # whole at any time, for the other processes
if [[ -f $run/finished ]]; then
  echo "$run is finished already:"
  cat "$run/finished"
  exit 0
fi
# A signal to the whole group stops the stage, which saves its work and gives 75; one to this shell
# alone stops after the stage.
trap 'exit 75' TERM USR1
waiting= # the number of the sharding.once that is to hear how a command ends
trap 'code=$?; [[ -z $waiting ]] || ended $code || true
  [[ $code == 75 ]] && echo "stopped: bash scripts/iterate.sh $recipe goes on" >&2; exit $code' EXIT
trap '' PIPE # of several processes another died: sharding.once has said so, and gives 75

once() { # COMMAND…: by process 0 only; the others wait, and end with its exit code where it fails
  if [[ -z ${COORDINATOR:-} ]]; then
    "$@"
  elif [[ $PROCESS_ID == 0 ]]; then
    coproc ONCE { python -m sharding.once; }
    waiting=$ONCE_PID to=${ONCE[1]}
    COORDINATOR='' JAX_PLATFORMS=${JAX_PLATFORMS:-$alone_on} "$@"
    ended 0
  else
    python -m sharding.once
  fi
}
ended() { # CODE: tell the others, and wait until they know
  local pid=$waiting
  waiting=
  { echo "$1" >&"$to"; } 2>/dev/null || true
  wait "$pid"
}
# One worker of a TPU pod cannot use its chips without the others.
alone_on=$({ compgen -G '/dev/accel*' || compgen -G '/dev/vfio/[0-9]*'; } >/dev/null && echo cpu || true)

limited() { # FILE: keep only the first LIMIT prompts
  [[ $LIMIT == 0 ]] || { head -n "$LIMIT" "$1" >"$1.cut" && mv "$1.cut" "$1"; }
}
fetched() { # COMMAND… FILE: make FILE by `COMMAND… FILE`, once and whole
  local out=${*: -1}
  [[ -f $out ]] && return
  mkdir -p "$(dirname "$out")"
  "${@:1:$#-1}" "$out.new"
  limited "$out.new"
  local extra
  for extra in manifest.json set_aside.jsonl; do
    [[ ! -f $out.new.$extra ]] || mv "$out.new.$extra" "$out.$extra"
  done
  mv "$out.new" "$out"
}
prepare() { # the held-out prompts and the start model; can the run go on to its end
  fetched heldout_prompts "$run/heldout.jsonl"
  [[ -d $run/start/checkpoint ]] || start_model "$run/start/checkpoint"
  python -m scripts.ready "$run" --iterations "$ITERATIONS" --ranker "$RANKER"
}
evaluate() { # CHECKPOINT FOLDER: answers to the held-out prompts, scored
  python -m stages.sample --checkpoint "$1" --prompts "$run/heldout.jsonl" \
    --out "$2/heldout.samples.jsonl" --seed "$SEED" ${HELDOUT_SAMPLE:-$SAMPLE}
  python -m stages.rank --ranker "$RANKER" --samples "$2/heldout.samples.jsonl" \
    --out "$2/heldout.ranked.jsonl" $RANK
}
compare() { # FOLDER OTHER NAME: its held-out answers against OTHER's, and how far it is from OTHER
  python -m stages.evaluate compare --outputs "$1/heldout.samples.jsonl" --ranker "$RANKER" \
    --baseline "$2/heldout.samples.jsonl" --out "$1/against_$3.json"
  python -m stages.evaluate kl --checkpoint "$2/checkpoint" --samples "$1/heldout.samples.jsonl" \
    --out "$1/kl_to_$3.json" $KL
}
finish() { # the last model for transformers, and what to know of the run
  [[ -d $run/final-hf ]] || python -m scripts.convert to-hf "$model" "$run/final-hf" \
    --base "$run/start/checkpoint" --results "$it/against_start.json" "$it/kl_to_start.json" \
    ${EXPORT_DTYPE:+--dtype "$EXPORT_DTYPE"}
  {
    python -m scripts.report "$run" --terms
    echo "The last model, for transformers:"
    echo "  AutoModelForCausalLM.from_pretrained(\"$run/final-hf\")"
  } | tee "$run/finished.new"
  mv "$run/finished.new" "$run/finished"
}
say() { printf '\n== %s  %s\n' "$(date +%H:%M:%S)" "$*"; }

say "$NAME: $ITERATIONS iterations, seed $SEED, under $run/"
once prepare
say "start: answers to the held-out prompts"
evaluate "$run/start/checkpoint" "$run/start"

model=$run/start/checkpoint
for ((k = 1; k <= ITERATIONS; k++)); do
  it=$run/iteration_$k
  once fetched train_prompts "$k" "$it/prompts.jsonl"
  say "iteration $k of $ITERATIONS: sample"
  python -m stages.sample --checkpoint "$model" --prompts "$it/prompts.jsonl" \
    --out "$it/samples.jsonl" --seed "$SEED" $SAMPLE
  say "iteration $k of $ITERATIONS: rank, pairs"
  python -m stages.rank --ranker "$RANKER" --samples "$it/samples.jsonl" \
    --out "$it/ranked.jsonl" $RANK
  once python -m stages.pairs --ranked "$it/ranked.jsonl" --out "$it/pairs.jsonl" $PAIRS
  say "iteration $k of $ITERATIONS: dpo"
  test_pairs=()
  [[ -s $it/pairs.test.jsonl ]] && test_pairs=(--test-pairs "$it/pairs.test.jsonl")
  python -m stages.dpo --checkpoint "$model" --pairs "$it/pairs.jsonl" "${test_pairs[@]}" \
    --out "$it/checkpoint" --seed "$SEED" $DPO
  model=$it/checkpoint
  say "iteration $k of $ITERATIONS: answers to the held-out prompts"
  evaluate "$model" "$it"
  say "iteration $k of $ITERATIONS: against the start and the iteration before"
  compare "$it" "$run/start" start
  [[ $k == 1 ]] || compare "$it" "$run/iteration_$((k - 1))" previous
  once python -m scripts.report "$run"
done

say "export"
once finish
