# Every target works on a fresh clone: .venv is built when it is missing or older than what defines it.
PYTHON ?= python3
VENV := .venv
# Relative, for the path to here may have spaces.
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup quickstart check test test-lowest lint docs matrix bench bench-training bench-converter bench-gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(STAMP)
	sh examples/llava_mcore/quickstart.sh

check: lint test

# A file's tests share what they set up, so that they stay together; in the files' order, the longest are not the last.
# Hundreds of processes import what is compiled here, also where they may not write it (PYTHONDONTWRITEBYTECODE).
test: $(STAMP)
	$(BIN)/python -m compileall -q megatron_patch tests toolkits
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# The lowest versions that pyproject.toml allows; the last two are what that transformers asks for.
LOWEST := megatron-energon==7.4.0 webdataset==0.2.111 pillow==10.0.1 transformers==4.57.1 \
    tokenizers==0.22.2 huggingface-hub==0.36.2

build/lowest/.installed: pyproject.toml $(STAMP)
	rm -rf build/lowest
	$(BIN)/python -m pip install --quiet --no-deps --target build/lowest $(LOWEST)
	touch $@

# What reads samples, images, tokenizers and checkpoints through those libraries, and takes seconds.
LOWEST_TESTS := $(addprefix tests/unit/data/test_, conversation.py decode.py images.py loader.py position.py \
    preprocessor.py private_api.py task_encoder.py tokenize.py) tests/unit/prepare/test_convert.py \
    tests/unit/conversion/test_verify.py tests/unit/families/test_llava.py

test-lowest: build/lowest/.installed
	PYTHONPATH="$(CURDIR)/build/lowest" $(BIN)/python -m pytest --numprocesses auto --dist loadfile \
	    -m "not transformers_5" $(LOWEST_TESTS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --output-format min-text
	git ls-files '*.sh' .ci/run | xargs $(BIN)/shellcheck

# The pages that say what the code says.
docs: $(STAMP)
	$(BIN)/python docs/generate.py

matrix: $(STAMP)
	$(BIN)/python -W ignore -m tests.distributed.matrix

bench: bench-training bench-converter

bench-training: $(STAMP)
	$(BIN)/python -W ignore benchmarks/train.py

bench-converter: $(STAMP)
	$(BIN)/python benchmarks/converter.py

bench-gpu: $(STAMP)
	sh benchmarks/gpu_check.sh
	$(BIN)/python benchmarks/gpu_table.py --compare

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
