#!/bin/sh
# Gather what benchmarks/gpu_check.sh needs on a machine with a GPU, Python 3.12 and torch, but without a package index:
#   sh benchmarks/gpu_wheels.sh FOLDER [PYTHON312]
# FOLDER/wheels gets the wheels, FOLDER/engine Transformer Engine (te.tar.xz: its library for one kind of GPU alone, its
# Python, and the sources of its torch part, which that machine compiles). Set SM for the kind of GPU (default 90, an
# H100 or H200) and TE for Transformer Engine's version; TE=none leaves it out. PYTHON312 with torch and transformers,
# if there is one, imports it all once.
set -eu

FOLDER=${1:-./build/gpu}
PYTHON312=${2:-python3.12}
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(dirname "$HERE")
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
TE=${TE:-2.11.0}
SM=${SM:-90}

case $FOLDER in
-*)
    echo "error: $FOLDER: expected a folder; the head of $0 says what it takes" >&2
    exit 2
    ;;
esac
if ! command -v "$PYTHON" >/dev/null; then
    echo "error: $PYTHON: not there; run make setup, or set PYTHON" >&2
    exit 2
fi
mkdir -p "$FOLDER/wheels" "$FOLDER/engine"
FOLDER=$(cd "$FOLDER" && pwd)
TEMPORARY=$(mktemp -d)
trap 'rm -rf "$TEMPORARY"' EXIT

download() {
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "$@"
}

"$PYTHON" "$HERE/wheels.py" wanted >"$TEMPORARY/wanted.txt"
rm -f "$FOLDER"/wheels/*.whl "$FOLDER/engine/te.tar.xz"
download --requirement "$TEMPORARY/wanted.txt" --dest "$FOLDER/wheels"

if [ "$TE" != none ]; then
    site=$TEMPORARY/site
    mkdir -p "$site" "$TEMPORARY/te"
    download --dest "$TEMPORARY/te" "transformer-engine==$TE" "transformer-engine-cu13==$TE"
    # pip asks a source distribution for its requirements, and this one asks torch for its CUDA, which is not here.
    "$PYTHON" "$HERE/wheels.py" stub "$TEMPORARY/stub"
    PYTHONPATH=$TEMPORARY/stub "$PYTHON" -m pip download --quiet --no-deps --no-build-isolation \
        --no-binary=transformer-engine-torch --dest "$site" "transformer-engine-torch==$TE"
    for wheel in "$TEMPORARY"/te/*.whl; do
        "$PYTHON" -m zipfile -e "$wheel" "$site"
    done
    # Left in, it would be imported wherever jax is installed.
    rm -rf "$site/transformer_engine/jax"
    library=transformer_engine/wheel_lib/libtransformer_engine.so
    "$PYTHON" "$HERE/trim_fatbin.py" "$site/$library" "$TEMPORARY/library" --sm "$SM"
    mv "$TEMPORARY/library" "$site/$library"
    # More than -3 takes minutes and gains little.
    tar -C "$site" -cf - . | xz -3 >"$FOLDER/engine/te.tar.xz"
fi

"$PYTHON" "$HERE/wheels.py" check "$FOLDER"

if "$PYTHON312" -c 'import sys, torch, transformers; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
    # Before its own packages, as on the other machine.
    "$PYTHON312" -m pip install --quiet --no-index --no-deps --target "$TEMPORARY/target" "$FOLDER"/wheels/*.whl
    PYTHONPATH=$TEMPORARY/target:$ROOT "$PYTHON312" -W ignore -c \
        'import megatron_patch, megatron.energon; from megatron_patch.training import loop'
    echo "Python 3.12 imports the toolkit with these wheels"
else
    echo "not imported: $PYTHON312 is no Python 3.12 with torch and transformers; requirements were checked alone"
fi
