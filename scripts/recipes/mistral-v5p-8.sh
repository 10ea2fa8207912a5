# snorkel-mistral-7b on a TPU v5p-8: one host with 4 chips of 95 GB (8 counts its cores).
#
# A chip holds a quarter of everything. Training: fp32 parameters, gradients and both of AdamW's
# moments are 29 GB (RMSprop's one: 22), another 7.2 while two micro-batches' gradients are added.
# Sampling: bf16 weights 3.6 GB; 256 slots of 6,144 positions (prompts of up to 4,096 tokens) at
# 131 kB a position 52.

PLAN=v5p:2x2x1
MESH="1 -1 1"
SAMPLE_MESH="1 1 4"
SLOTS=256
MICRO_BATCH=32 # 8 pairs a chip
REMAT=full
source "$(dirname "${BASH_SOURCE[0]}")/snorkel-mistral-7b.sh"
