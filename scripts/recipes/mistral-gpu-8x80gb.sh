# snorkel-mistral-7b on one machine with 8 GPUs of 80 GB (H100, A100).
#
# A GPU holds an eighth of everything. Training: fp32 parameters, gradients and both of AdamW's
# moments are 14.5 GB (RMSprop's one: 10.9), another 3.6 while two micro-batches' gradients are added.
# Sampling: bf16 weights 1.8 GB; 256 slots of 6,144 positions (prompts of up to 4,096 tokens) at
# 131 kB a position 25.8.

PLAN=h100:8
MESH="1 -1 1"
SAMPLE_MESH="1 1 8"
SLOTS=256
MICRO_BATCH=32 # 4 pairs a GPU
REMAT=full
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92} # jax takes 0.75
source "$(dirname "${BASH_SOURCE[0]}")/snorkel-mistral-7b.sh"
