#!/usr/bin/env bash
# Iterative preference alignment: sample → rank → pairs → dpo, each iteration from the last model.
#
#   bash scripts/iterate.sh [RECIPE [MACHINE]]   demo, snorkel-mistral-7b, or a TOML file of your own;
#                                                MACHINE: one of its [machine.NAME], e.g. v5p-8
# Run it again after any interruption: it goes on where it was. Environment:
#   VARIANT=2024 one of the recipe's [variant.NAME]; [from_environment] names more variables
#   NAME=demo    the run is kept under RUNS/NAME/ (default: the recipe's name, variant and seed)
#   SEED=0       seed of sampling and of the order of the pairs
#   LIMIT=64     take only so many prompts per iteration: a smoke run of any recipe
#   RUNS=runs    where the runs are kept, e.g. a folder of a file system that several hosts share
#   PYTHON=…     an interpreter that has everything installed: skips the set-up of .venv
#   COORDINATOR=HOST:PORT PROCESSES=4 PROCESS_ID=0 … 3   one loop by several processes: this command
#                with its number in each, on a file system that all see; COORDINATOR=auto on TPU pods
set -euo pipefail
[[ ${1:-} != -* ]] || { sed -n '2,14s/^# \?//p' "$0"; exit 2; }
[[ ! -f ${1:-} ]] || set -- "$(realpath "$1")" "${@:2}" # a relative path is the caller's
cd "$(dirname "$0")/.."
[[ ${1:-} != *.sh || ! -f $1 ]] || exec bash scripts/from_shell.sh "$1" # recipes were shell files before

[[ -n ${PYTHON:-} ]] || flock scripts/setup.sh bash scripts/setup.sh # one process at a time
python() { PYTHONUTF8=1 command "${PYTHON:-.venv/bin/python}" "$@"; } # whatever the locale
source scripts/together.sh # `once`, and the exit code
settings=$(python -m scripts.recipe "$@") # refuses a faulty recipe, and another than began this run
eval "$settings"
show_life
[[ ! -f $run/finished || ! -d $run/iteration_$ITERATIONS/checkpoint ]] ||
  { echo "$run is finished already:" && cat "$run/finished" && exit; }
# Each program, however small, is compiled once and kept beside the runs, for all hosts of a pod.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(realpath -m "${RUNS:-runs}")/.compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# On CPU, XLA allocates its buffers anew at every call. Giving memory back to the system in between, or
# using several threads' arenas, costs a tenth of a training step; small pages cost another tenth.
keep_memory=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000:glibc.malloc.arena_max=1
has_tpu || has_gpu || export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:$keep_memory}

say() { printf '\n== %s  %s\n' "$(date +%H:%M:%S)" "$*"; }
prompts() { # ITERATION FILE; iteration 0: the held-out prompts
  local -n from=PROMPTS_$1
  [[ -f $2 && ! -e $2.partial ]] || python -m scripts.convert prompts "${from[0]}" "$2" "${from[@]:1}"
}
start_model() { # CHECKPOINT
  case $MODEL in
    gguf:*) python -m scripts.convert from-gguf "${MODEL#gguf:}" "$1" ;;
    checkpoint:*) mkdir -p "$1.copy" && cp -r "${MODEL#checkpoint:}/." "$1.copy" &&
      sync -f "$1.copy" && mv "$1.copy" "$1" ;;
    *) python -m scripts.convert from-hf "$MODEL" "$1" ;;
  esac
}
prepare() { # the held-out prompts, the start model, and a check that the run can go on to its end
  if [[ -f $run/finished ]]; then # with fewer iterations: the exported model moves to its checkpoint
    local trained=("$run"/iteration_*/checkpoint)
    [[ ! -d $run/final-hf ]] || mv "$run/final-hf" "$run/iteration_${#trained[@]}/hf"
    rm "$run/finished"
  fi
  prompts 0 "$run/heldout.jsonl"
  [[ -d $run/start/checkpoint ]] || start_model "$run/start/checkpoint"
  python -m scripts.ready "$run" --iterations "$ITERATIONS" --ranker "$RANKER"
}
evaluate() { # CHECKPOINT FOLDER: answers to the held-out prompts, scored
  python -m stages.sample --checkpoint "$1" --prompts "$run/heldout.jsonl" \
    --out "$2/heldout.samples.jsonl" --seed "$SEED" "${HELDOUT_SAMPLE[@]}"
  python -m stages.rank --ranker "$RANKER" --samples "$2/heldout.samples.jsonl" \
    --out "$2/heldout.ranked.jsonl" "${RANK[@]}"
}
compare() { # FOLDER OTHER NAME: its held-out answers against OTHER's, and how far it is from OTHER
  python -m stages.evaluate compare --outputs "$1/heldout.samples.jsonl" --ranker "$RANKER" \
    --baseline "$2/heldout.samples.jsonl" --out "$1/against_$3.json"
  python -m stages.evaluate kl --checkpoint "$2/checkpoint" --samples "$1/heldout.samples.jsonl" \
    --out "$1/kl_to_$3.json" "${KL[@]}"
}
finish() { # the last model for transformers, and the table of the run
  [[ -d $run/final-hf ]] || python -m scripts.convert to-hf "$model" "$run/final-hf" "${EXPORT[@]}" \
    --base "$run/start/checkpoint" --results "$it/against_start.json" "$it/kl_to_start.json"
  local table; table=$(python -m scripts.report "$run" --terms)
  tee "$run/finished.new" <<<"$table
The last model: AutoModelForCausalLM.from_pretrained(\"$run/final-hf\")"
  mv "$run/finished.new" "$run/finished"
}

say "$NAME: $ITERATIONS iterations, seed $SEED, under $run/"
once "$run/.prepared" prepare
model=$run/start/checkpoint
say "start: answers to the held-out prompts"
evaluate "$model" "$run/start"
for ((k = 1; k <= ITERATIONS; k++)); do
  it=$run/iteration_$k
  once "$it/.prompts" prompts "$k" "$it/prompts.jsonl"
  say "iteration $k of $ITERATIONS: sample"
  python -m stages.sample --checkpoint "$model" --prompts "$it/prompts.jsonl" \
    --out "$it/samples.jsonl" --seed "$SEED" "${SAMPLE[@]}"
  say "iteration $k of $ITERATIONS: rank, pairs"
  python -m stages.rank --ranker "$RANKER" --samples "$it/samples.jsonl" \
    --out "$it/ranked.jsonl" "${RANK[@]}"
  once "$it/.pairs" python -m stages.pairs --ranked "$it/ranked.jsonl" --out "$it/pairs.jsonl" "${PAIRS[@]}"
  say "iteration $k of $ITERATIONS: dpo"
  [[ -s $it/pairs.test.jsonl ]] && test_pairs=(--test-pairs "$it/pairs.test.jsonl") || test_pairs=()
  python -m stages.dpo --checkpoint "$model" --pairs "$it/pairs.jsonl" "${test_pairs[@]}" \
    --out "$it/checkpoint" --seed "$SEED" "${DPO[@]}"
  model=$it/checkpoint
  say "iteration $k of $ITERATIONS: answers to the held-out prompts"
  evaluate "$model" "$it"
  say "iteration $k of $ITERATIONS: against the start and the iteration before"
  compare "$it" "$run/start" start
  [[ $k == 1 ]] || compare "$it" "$run/iteration_$((k - 1))" previous
  once "$it/.report" python -m scripts.report "$run"
done

say "export"
once "$run/.finished" finish
