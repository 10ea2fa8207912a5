#!/usr/bin/env bash
# Run a recipe on GPU nodes under SLURM: one process a node, one mesh over all their GPUs.
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 scripts/slurm.sh [RECIPE [MACHINE]]
#
# Call it from the project's folder, on a file system that the nodes share. Default: snorkel-mistral-7b
# gpu-8x80gb. Flags of sbatch take precedence over those below. Five minutes before the time limit (or
# at `scancel --batch --signal=USR1 JOB`) the stage saves its work and the job goes back into the queue,
# as it does when it is preempted; later it goes on where it was. NAME, VARIANT, SEED, … are as for
# scripts/iterate.sh. RUNS may name another folder on a shared file system.
#SBATCH --job-name=align
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=align-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

[[ -n ${SLURM_JOB_ID:-} ]] || { echo "error: no job: start it with sbatch scripts/slurm.sh" >&2; exit 2; }
(($#)) || set -- snorkel-mistral-7b gpu-8x80gb
cd "$SLURM_SUBMIT_DIR" # the batch system runs a copy of this file from elsewhere
[[ -f scripts/iterate.sh ]] || {
  echo "error: $PWD is not the project's folder: call sbatch there" >&2
  exit 2
}
if [[ -z ${PYTHON:-} ]]; then
  bash scripts/setup.sh # once, before the processes start; it finds this first node's GPUs
  export PYTHON=$PWD/.venv/bin/python
fi
if ((SLURM_JOB_NUM_NODES > 1)); then
  # The addresses are set here. jax would find them itself under SLURM, but it assumes one process per
  # GPU there, and would give each process only one GPU of its node.
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export COORDINATOR=${nodes[0]}:$((20000 + SLURM_JOB_ID % 10000)) PROCESSES=$SLURM_JOB_NUM_NODES
fi

# Signals reach only this shell. Job step 0 is the srun below, with every process of every node.
pass_on() { signalled=1; scancel --signal=TERM "$SLURM_JOB_ID.0" || true; }
again=
trap 'again=1; pass_on' USR1
trap 'pass_on' TERM
# shellcheck disable=SC2016  # expanded by the tasks
srun --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c '
  [[ -z ${PROCESSES:-} ]] || export PROCESS_ID=$SLURM_PROCID
  unset SLURM_LOCALID # by which jax recognises SLURM
  exec bash scripts/iterate.sh "$@"' bash "$@" &
task=$!
signalled=1
while [[ -n $signalled ]]; do # a signal ends `wait`, but not the task
  signalled= code=0
  wait $task || code=$?
done
if ((code > 128)); then
  echo "a process was killed: submit the same job again to go on" >&2
  code=75
fi
[[ -z $again || $code != 75 ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
