#!/bin/sh
# Pretrain LLaVA on Megatron-Core. On this machine's GPUs, or on its CPU where there is none.
#
#   sh run_mcore_llava.sh ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN DECODER_SEQ_LEN PR TP PP CP \
#      DO FL AC OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH \
#      TRAIN_ITERS LR_WARMUP_ITERS OUTPUT_BASEPATH [--flag value ...]
#
#   sh run_mcore_llava.sh dsw 7B 1 256 0.00015 1e-5 576 1024 bf16 4 1 1 true true true false 100000 \
#      LLaVA-Pretrain/wds LLaVA-Pretrain/wds mistral-clip-mcore-tp4 10000 500 output
#
# Further flags (all of them: `python pretrain_llava.py --help`) come after the 23rd argument and win over it:
#   --freeze-lm false --freeze-vit false --seed 7 --eval-interval 500 --num-workers 4
# Run again with the same arguments, it resumes.
set -eu

if [ $# -lt 23 ]; then
    echo "error: $# arguments, expected 23:" >&2
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

ENV=$1                          # dsw: this machine | dlc: several nodes, addresses from the environment
MODEL_SIZE=$2                   # 7B | 13B | ... | auto; checked against the checkpoint's config.json
BATCH_SIZE=$3                   # samples of a micro batch, per data-parallel rank
GLOBAL_BATCH_SIZE=$4            # samples of an iteration
LR=$5                           # highest learning rate
MIN_LR=$6                       # learning rate of the last iteration
SEQ_LEN=$7                      # positions of an image: 576 for CLIP at 336 pixels
DECODER_SEQ_LEN=$8              # longest sequence of the language model, images included
PR=$9                           # bf16 | fp16 | fp32 | fp8: with Transformer Engine
TP=${10}                        # tensor-parallel ranks
PP=${11}                        # pipeline stages
CP=${12}                        # context-parallel ranks
DO=${13}                        # true | false: distributed optimizer
FL=${14}                        # true | false: flash attention
AC=${15}                        # sel (true) | full: activations recomputed | offload: kept on the CPU | none (false)
OPTIMIZER_OFFLOAD=${16}         # static: optimizer states on the CPU | auto: as many as need be | false
SAVE_INTERVAL=${17}             # iterations between checkpoints
DATASET_PATH=${18}              # energon dataset, its train split
VALID_DATASET_PATH=${19}        # energon dataset, its val split | none
PRETRAIN_CHECKPOINT_PATH=${20}  # Megatron-Core checkpoint | none
TRAIN_ITERS=${21}               # iterations
LR_WARMUP_ITERS=${22}           # iterations until the highest learning rate
OUTPUT_BASEPATH=${23}           # gets checkpoint/, tensorboard/ and log/
shift 23

REPO=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
PYTHON=$REPO/.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=$(command -v python || echo python3)
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"

exec "$PYTHON" "$REPO/examples/llava_mcore/pretrain_llava.py" \
    --env="$ENV" \
    --model-size="$MODEL_SIZE" \
    --micro-batch-size="$BATCH_SIZE" \
    --global-batch-size="$GLOBAL_BATCH_SIZE" \
    --lr="$LR" \
    --min-lr="$MIN_LR" \
    --seq-length="$SEQ_LEN" \
    --decoder-seq-length="$DECODER_SEQ_LEN" \
    --precision="$PR" \
    --tensor-model-parallel-size="$TP" \
    --pipeline-model-parallel-size="$PP" \
    --context-parallel-size="$CP" \
    --use-distributed-optimizer="$DO" \
    --use-flash-attn="$FL" \
    --recompute="$AC" \
    --optimizer-offload="$OPTIMIZER_OFFLOAD" \
    --save-interval="$SAVE_INTERVAL" \
    --data-path="$DATASET_PATH" \
    --valid-data-path="$VALID_DATASET_PATH" \
    --pretrained-checkpoint="$PRETRAIN_CHECKPOINT_PATH" \
    --train-iters="$TRAIN_ITERS" \
    --lr-warmup-iters="$LR_WARMUP_ITERS" \
    --output="$OUTPUT_BASEPATH" \
    "$@"
