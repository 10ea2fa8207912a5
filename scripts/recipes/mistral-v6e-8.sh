# snorkel-mistral-7b on a TPU v6e-8: one host with 8 chips of 32 GB.
#
# A chip holds an eighth of everything. Training: fp32 parameters, gradients and both of AdamW's
# moments are 14.5 GB (RMSprop's one: 10.9), another 3.6 while two micro-batches' gradients are added.
# Sampling: bf16 weights 1.8 GB; 128 slots of 6,144 positions (prompts of up to 4,096 tokens) at
# 131 kB a position 12.9.

PLAN=v6e:2x4
MESH="1 -1 1"
SAMPLE_MESH="1 1 8"
SLOTS=128
MICRO_BATCH=32 # 4 pairs a chip
REMAT=full
source "$(dirname "${BASH_SOURCE[0]}")/snorkel-mistral-7b.sh"
