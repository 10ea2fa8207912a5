# snorkel-mistral-7b on one GPU of 141 GB (H200; it has 150 × 10⁹ bytes). On one of 80 GB it does not
# fit: parameters, gradients and one moment in fp32 are 87 GB.
#
# Training, in GB: parameters 29, RMSprop's moment 29, gradients 29, another 29 while two
# micro-batches' are added, a bf16 copy of the weights 14.5: 130. That leaves 13 of what jax may take
# for the activations of two pairs (a layer's input of each 1,536 tokens a pair: 0.8). AdamW's second
# moment would make it 159.
# Sampling: bf16 weights 14.5; 96 slots of 6,144 positions (prompts of up to 4,096 tokens) at 131 kB a
# position 77.

PLAN=h200:1
MESH="1 1 1"
SAMPLE_MESH="1 1 1"
SLOTS=96
MICRO_BATCH=2
REMAT=full
if [[ ${ZEPHYR:-2023} != 2023 ]]; then
  echo "error: ZEPHYR=$ZEPHYR trains with AdamW, which takes 159 GB for 7B: one GPU has 150;" \
    "leave ZEPHYR at 2023, or take more devices" >&2
  exit 2
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95} # jax takes 0.75
source "$(dirname "${BASH_SOURCE[0]}")/snorkel-mistral-7b.sh"
