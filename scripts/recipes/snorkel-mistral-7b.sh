# The published pipeline: Mistral-7B-Instruct-v0.2, PairRM, the published dataset's own prompts, three
# iterations, each starting from the last model and taking it as the reference.
#
# Sources: hf.co/snorkelai/Snorkel-Mistral-PairRM-DPO (method, dataset, "the Zephyr recipe"), the
# Zephyr recipe of huggingface/alignment-handbook. What Snorkel did not publish is marked "ours".
# For TPU slices and GPUs of together 150 GB or more; needs the hub once, or local copies:
#   MODEL     hub id or folder of the start model
#   DATASET   hub id or folder; its train_iteration_N and test_iteration_N give the prompts.
#             The alternative is UltraFeedback itself in three slices of 20,000: set
#             DATASET=HuggingFaceH4/ultrafeedback_binarized
#   RANKER    PairRM's hub id or folder
#   PAIRRM_DTYPE  what PairRM ranks the samples in: float32, or bfloat16, which is quicker
#   ZEPHYR    2023: β 0.1, linear, RMSprop, 3 epochs, batch 64 (fits Snorkel's published metrics)
#             2024: β 0.01, cosine, AdamW, 1 epoch, batch 128
# mistral-v5e-16, -v5p-8, -v6e-8, -gpu-141gb and -gpu-8x80gb set, for such a machine,
#   PLAN         its topology, for scripts.plan
#   MESH         devices along data, fsdp and tensor in training
#   SAMPLE_MESH  in sampling: along tensor no step moves the weights
#   SLOTS        answers in the making at a time
#   MICRO_BATCH  pairs in memory at a time
#   REMAT        what the backward pass computes again

MODEL=${MODEL:-mistralai/Mistral-7B-Instruct-v0.2}
DATASET=${DATASET:-snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset}
RANKER=${RANKER:-llm-blender/PairRM}
PAIRRM_DTYPE=${PAIRRM_DTYPE:-}
ZEPHYR=${ZEPHYR:-2023}
# What must not change when a run goes on. This file too, where another recipe takes it in.
SETTINGS="$MODEL $DATASET $RANKER $PAIRRM_DTYPE $ZEPHYR $(sha256sum <"${BASH_SOURCE[0]}" | cut -c1-16)"
ITERATIONS=3

start_model() { python -m scripts.convert from-hf "$MODEL" "$1"; }
prompts_of() { # SPLIT OUT [FIRST LAST]
  python -m scripts.convert prompts "$DATASET" "$2" --split "$1" ${3:+--first "$3" --last "$4"}
}
case $DATASET in
  *ultrafeedback_binarized*)
    train_prompts()   { prompts_of train_prefs "$2" $((($1 - 1) * 20000)) $(($1 * 20000)); }
    heldout_prompts() { prompts_of test_prefs "$1" 0 1000; } ;;
  *)
    train_prompts()   { prompts_of "train_iteration_$1" "$2"; }
    # Never trained on in any iteration, and the same for all of them.
    heldout_prompts() { prompts_of test_iteration_1 "$1"; } ;;
esac

# n is the published one; temperature, top-p and length are ours (SPPO's, of the same pipeline).
drawn="--temperature 0.7 --top-p 0.9 --max-new-tokens 2048"
fast="--slots ${SLOTS:-64} --dtype bfloat16${SAMPLE_MESH:+ --mesh $SAMPLE_MESH}"
SAMPLE="--n 5 $drawn $fast"
HELDOUT_SAMPLE="--n 1 $drawn $fast"
case $PAIRRM_DTYPE in
  "" | float32 | bfloat16) RANK="${PAIRRM_DTYPE:+--dtype $PAIRRM_DTYPE}" ;;
  *) echo "error: PAIRRM_DTYPE=$PAIRRM_DTYPE: it must be float32 or bfloat16" >&2; exit 2 ;;
esac
case $RANKER in *.py:*) RANK= ;; esac # a function has no dtype
PAIRS="--test-fraction 0.05" # the published splits hold 1,000 test rows to 20,000
DPO="--learning-rate 5e-7 --warmup-ratio 0.1 --max-length 1024 --max-prompt-length 512
     --micro-batch-size ${MICRO_BATCH:-8} --dtype bfloat16 --remat ${REMAT:-full}
     ${MESH:+--mesh $MESH}"
case $ZEPHYR in
  2023) DPO+=" --beta 0.1 --schedule linear --optimizer rmsprop --epochs 3 --batch-size 64" ;;
  2024) DPO+=" --beta 0.01 --schedule cosine --optimizer adamw --epochs 1 --batch-size 128" ;;
  *) echo "error: ZEPHYR=$ZEPHYR: it must be 2023 or 2024" >&2; exit 2 ;;
esac
KL="--prompts 256 --dtype bfloat16" # of the held-out ones, for the distance to the other models
EXPORT_DTYPE=bfloat16
