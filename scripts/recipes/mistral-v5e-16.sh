# snorkel-mistral-7b on a TPU v5e slice of 16 chips of 16 GB: 4 hosts of 4 chips, one process a host.
#
# A chip holds a sixteenth of what a training has: fp32 parameters, gradients and both of AdamW's
# moments are 7.2 GB (RMSprop's one: 5.4), another 1.8 while two micro-batches' gradients are added.
# Sampling: an eighth of the bf16 weights, 1.8 GB; 128 slots of 6,144 positions (prompts of up to
# 4,096 tokens) at 131 kB a position 6.4.

PLAN=v5e:4x4
MESH="1 -1 1"
SAMPLE_MESH="2 1 8" # 8 key heads: no more than 8 chips along tensor
SLOTS=128
MICRO_BATCH=32 # two pairs a chip: with one, the longest pair pads all others by two fifths
REMAT=full
source "$(dirname "${BASH_SOURCE[0]}")/snorkel-mistral-7b.sh"
