#!/bin/sh
# Convert LLaVA between Hugging Face and Megatron-Core.
#
# usage: bash hf2mcore_convertor_llava.sh MODEL_SIZE SOURCE_LLM_CKPT_PATH SOURCE_CLIP_CKPT_PATH TARGET_CKPT_PATH \
#            TP PP mg2hf PR [HF_CKPT_PATH] [--flag value ...]
#
#   MODEL_SIZE             7B | 13B | ... | auto    checked against the language model's config.json; auto: not checked
#   SOURCE_LLM_CKPT_PATH   folder                   mg2hf=false: a Llama, Vicuna, Mistral, Qwen2 or whole
#                                                   LLaVA from Hugging Face, or a Megatron-Core checkpoint, which is
#                                                   resharded for TP and PP
#                                                   mg2hf=true: a Megatron-Core checkpoint, saved at any TP and PP
#   SOURCE_CLIP_CKPT_PATH  folder | none            a CLIP or SigLIP from Hugging Face; none where the source is a whole
#                                                   LLaVA or Megatron-Core's
#   TARGET_CKPT_PATH       folder                   for the result; new or empty
#   TP PP                  numbers                  tensor and pipeline parallel sizes of the shards written
#   mg2hf                  true | false             true: Megatron-Core to Hugging Face
#   PR                     bf16 | fp16 | fp32       type of the weights written
#   HF_CKPT_PATH           folder | none            mg2hf=true: where config.json and tokenizer come from, when the
#                                                   checkpoint does not carry them
#
# Named flags after these (convert.py --help explains them): --ckpt-format, --virtual-pipeline-model-parallel-size,
# --decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers, --verify, --no-check, --parts,
# --max-shard-size, --projector, --add-tokens, --prompt-format, --seed.
#
# example: bash hf2mcore_convertor_llava.sh 7B Mistral-7B-Instruct clip-vit-large-patch14-336 OUT 4 1 false bf16

set -eu

usage() {
    echo "error: $# arguments given, 8 or 9 expected" >&2
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

[ $# -ge 8 ] || usage "$@"
MODEL_SIZE=$1
SOURCE_LLM_CKPT_PATH=$2
SOURCE_CLIP_CKPT_PATH=$3
TARGET_CKPT_PATH=$4
TP=$5
PP=$6
MG2HF=$7
PR=$8
shift 8

HF_CKPT_PATH=none
case ${1---} in
    --*) ;;
    *) HF_CKPT_PATH=$1 && shift ;;
esac
case ${1---} in
    --*) ;;
    *) usage 1 2 3 4 5 6 7 8 9 "$@" ;;
esac

REPO=$(CDPATH='' cd -- "$(dirname -- "$0")/../../.." && pwd)
PYTHON=$REPO/.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=$(command -v python || echo python3)
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"

exec "$PYTHON" "$REPO/toolkits/model_checkpoints_convertor/convert.py" \
    --model-size="$MODEL_SIZE" \
    --source-llm-ckpt-path="$SOURCE_LLM_CKPT_PATH" \
    --source-clip-ckpt-path="$SOURCE_CLIP_CKPT_PATH" \
    --target-ckpt-path="$TARGET_CKPT_PATH" \
    --tensor-model-parallel-size="$TP" \
    --pipeline-model-parallel-size="$PP" \
    --mg2hf="$MG2HF" \
    --precision="$PR" \
    --hf-ckpt-path="$HF_CKPT_PATH" \
    "$@"
