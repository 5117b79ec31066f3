#!/bin/sh
# The whole pipeline on a CPU, in minutes: a small Mistral, a small CLIP and generated pictures go through the real
# scripts, and transformers captions pictures that were never trained on with what comes out.
#
#   sh quickstart.sh [FOLDER]
#
# FOLDER (default: quickstart/ in the repository): one that an earlier quickstart made is replaced.
set -eu

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
ROOT=$(CDPATH='' cd -- "$HERE/../.." && pwd)
WORK=${1:-quickstart}
case $# in
    0) ;;
    1) case $WORK in /*) ;; *) WORK=$(pwd)/$WORK ;; esac ;;
    *) echo "error: $# arguments, expected at most one: the folder to work in" >&2 && exit 2 ;;
esac
cd "$ROOT" # every command below can be pasted there

PYTHON=.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=$(command -v python || echo python3)
PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
CUDA_VISIBLE_DEVICES='' # a CPU's run, where there is a GPU too
TRANSFORMERS_VERBOSITY=error
export PYTHONPATH CUDA_VISIBLE_DEVICES TRANSFORMERS_VERBOSITY

# Only what an earlier quickstart made is removed.
if [ -e "$WORK" ] && [ ! -f "$WORK/.quickstart" ]; then
    rmdir -- "$WORK" 2>/dev/null || {
        echo "error: $WORK: exists and is not a quickstart's folder; give another, or remove it" >&2
        exit 2
    }
fi
rm -rf -- "$WORK"
mkdir -p -- "$WORK/log"
touch -- "$WORK/.quickstart"

stage() { # name the next stage and note when it began
    printf '\n== %s\n' "$1"
    echo "$(date +%s) $1" >>"$WORK/log/stages"
}

show() { # print a command so that it can be pasted
    printf '\n  $'
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./,=:+-]*) printf " '%s'" "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
}

run() { # run LOG COMMAND...: print it, run it, show its last line
    log=$WORK/log/$1.log
    shift
    show "$@"
    "$@" >"$log" 2>&1 || {
        echo "error: failed; the end of $log:" >&2
        tail -n 20 "$log" >&2
        exit 1
    }
    tail -n 1 "$log" | sed 's/^/  /'
}

train() { # train LOG [OPTION...]: the same command each time; the second finds the first one's checkpoint
    log=$WORK/log/$1.log
    shift
    set -- "$log" "$@" -- env NPROC_PER_NODE=2 sh examples/llava_mcore/run_mcore_llava.sh \
        dsw auto 16 32 1e-3 1e-5 16 64 fp32 1 1 1 true true false false 200 \
        "$WORK/LLaVA-Pretrain/wds" "$WORK/LLaVA-Pretrain/wds" "$WORK/mcore-tp2" 800 50 "$WORK/output" \
        --freeze-lm false --freeze-vit false --log-interval 10 --eval-interval 200 --eval-iters 4 --num-workers 1
    (while [ "$1" != -- ]; do shift; done && shift && show "$@")
    "$PYTHON" examples/llava_mcore/quickstart_watch.py "$@"
}

echo "The commands run in $ROOT; their whole output is in $WORK/log."

stage '1 make models and pictures'
run make "$PYTHON" examples/llava_mcore/quickstart_make.py "$WORK"

stage '2 data: json and pictures to tar shards'
run data "$PYTHON" toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py "$WORK/LLaVA-Pretrain"

stage '3 weights: Hugging Face to Megatron-Core, TP 2'
run hf2mcore bash toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh \
    auto "$WORK/llm" "$WORK/clip" "$WORK/mcore-tp2" 2 1 false fp32

stage '4 train on 2 processes, until one is killed'
train train-killed --kill-at 430

stage '5 the same command again: it resumes'
train train-resumed

stage '6 weights: Megatron-Core to Hugging Face'
run mcore2hf bash toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh \
    auto "$WORK/output/checkpoint" none "$WORK/hf" 1 1 true fp32

stage '7 transformers captions pictures that were never trained on'
run caption "$PYTHON" examples/llava_mcore/quickstart_caption.py "$WORK/hf" "$WORK/held_out" "$WORK/captions.json"

stage 'end'
show "$PYTHON" examples/llava_mcore/quickstart_report.py "$WORK"
"$PYTHON" examples/llava_mcore/quickstart_report.py "$WORK"
