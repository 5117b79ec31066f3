"""The training script: photographs from folder to curve, across a signal; and mistakes answered at once."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_patch.config.train import MOCK
from tests import tiny_runs
from tests.distributed.runs import train
from tests.end_to_end.scripts import (
    CONVERT_DATA,
    CONVERT_MODEL,
    TRAIN,
    call,
    environment,
    processor_seconds,
    scalars,
    train_arguments,
)
from tests.tiny import save_clip, save_mistral
from tests.unit.data.samples import write_photos

ITERATIONS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a space in its name."""
    return tmp_path_factory.mktemp("a place", numbered=True)


@pytest.fixture(scope="module")
def photos(place) -> Path:
    folder = place / "LLaVA Pretrain"
    write_photos(folder, 40)
    result = call("python", CONVERT_DATA, folder, cwd=place)
    assert result.returncode == 0, result.stderr
    return folder / "wds"


@pytest.fixture(scope="module")
def weights(place) -> Path:
    """A small Mistral with the real v3 tokenizer and a small CLIP at 336 pixels, converted by the script."""
    llm = save_mistral(place / "a mistral", vocab_size=32768, hidden_size=48, head_dim=8, intermediate_size=64)
    for file in llm.glob("tokenizer*"):
        file.unlink()
    tokenizer = files("mistral_common") / "data/mistral_instruct_tokenizer_240323.model.v3"
    (llm / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    (llm / "tokenizer_config.json").write_text(json.dumps(settings))
    clip = save_clip(place / "a clip", image_size=336, patch_size=14, hidden_size=32, intermediate_size=64)
    result = call("bash", CONVERT_MODEL, "auto", llm, clip, place / "the weights", 1, 1, "false", "fp32", cwd=place)
    assert result.returncode == 0, result.stderr
    return place / "the weights"


def logged_losses(text: str) -> dict[int, str]:
    return {int(i): loss for i, loss in re.findall(r"iteration +(\d+)/.*?lm loss: ([0-9.]+)", text)}


def test_photographs_through_all_scripts_across_a_signal(place, photos, weights):
    """Ctrl-C saves the step that it comes in, long before the interval; the same command ends what was begun."""
    output = place / "the output"
    arguments = train_arguments(
        output,
        SEQ_LEN=576,
        DECODER_SEQ_LEN=640,
        LR=3e-3,
        SAVE_INTERVAL=500,
        DATASET_PATH=photos,
        VALID_DATASET_PATH=photos,
        PRETRAIN_CHECKPOINT_PATH=weights,
        TRAIN_ITERS=ITERATIONS,
        LR_WARMUP_ITERS=3,
    )
    flags = "--freeze-lm false --eval-iters 2 --log-captions 1 --num-workers 1 --keep-checkpoints 1".split()
    command = [str(word) for word in ("sh", TRAIN, *arguments, *flags)]
    code, printed, last = interrupted_after(3, command)
    assert code == 130
    assert [path.name for path in (output / "checkpoint").glob("iter_*")] == [f"iter_{last:07d}"]

    resumed = call(*command, cwd="/")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"resumed from {output}/checkpoint/iter_{last:07d} at iteration {last}" in resumed.stdout
    assert "corrupted" not in printed + resumed.stdout  # what megatron.core would say of a folder that we made
    assert [path.name for path in (output / "checkpoint").glob("iter_*")] == [f"iter_{ITERATIONS:07d}"]

    before, after = logged_losses(printed), logged_losses(resumed.stdout)
    assert [*before, *after] == list(range(1, ITERATIONS + 1))
    curve = scalars(output, "lm loss")
    assert sorted(curve) == list(range(1, ITERATIONS + 1))
    for iteration, loss in {**before, **after}.items():
        assert curve[iteration] == pytest.approx(float(loss), abs=1e-5)
    assert sum(curve[i] for i in range(ITERATIONS - 2, ITERATIONS + 1)) / 3 < curve[1] - 0.5
    lines = [json.loads(line) for line in (output / "log/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "lm loss" in line] == list(range(1, ITERATIONS + 1))
    rates = scalars(output, "learning-rate")
    assert rates[3] == pytest.approx(3e-3)
    assert rates[ITERATIONS] == pytest.approx(1e-4)
    assert scalars(output, "lm loss validation").keys() == {ITERATIONS}


def interrupted_after(iteration: int, command: list[str]) -> tuple[int, str, int]:
    """A run that gets SIGINT when `iteration` was logged: its exit code, what it printed, its last iteration."""
    process = subprocess.Popen(
        command, cwd="/", env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed = ""
    for line in process.stdout:
        printed += line
        if iteration in logged_losses(printed):
            process.send_signal(signal.SIGINT)
            break
    printed += process.stdout.read()
    code = process.wait(60)
    (last,) = re.findall(r"stopped by SIGINT after iteration (\d+); the same command goes on", printed)
    return code, printed, int(last)


@pytest.mark.parametrize(
    ("changed", "flags", "said"),
    [
        ({"TP": 3}, (), "--tensor-model-parallel-size 3: the language model has 4 query groups"),
        ({"TP": 5}, (), "which 5 does not divide; use 1, 2 or 4"),
        ({"MODEL_SIZE": "7B"}, (), "--model-size 7B: the language model's config.json describes"),
        ({"SEQ_LEN": 576}, (), "takes 16 positions; use 16"),
        ({"AC": "maybe"}, (), "--recompute 'maybe': expected one of none, sel, full"),
        ({"DO": "yes"}, (), "--use-distributed-optimizer 'yes': expected true or false"),
        ({"CP": 0}, (), "--context-parallel-size 0: expected 1 or more"),
        pytest.param(
            {"PR": "fp8"},
            (),
            "--precision fp8: needs transformer-engine[pytorch], which is not installed; use bf16",
            marks=pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is installed"),
        ),
        ({"OPTIMIZER_OFFLOAD": "static", "DO": "false"}, (), "--optimizer-offload static: needs --use-distributed-opt"),
        ({"AC": "sel"}, ("--recompute-num-layers", "2"), "--recompute-num-layers 2: needs --recompute full"),
        ({"DATASET_PATH": "/no/such/folder"}, (), "--data-path /no/such/folder: no such folder"),
        ({"PRETRAIN_CHECKPOINT_PATH": "/no/such"}, (), "--pretrained-checkpoint /no/such: no such folder"),
        ({"ENV": "laptop"}, (), "--env 'laptop': expected one of dsw, dlc"),
        ({}, ("--freeze-llm", "false"), "--freeze-llm: no such flag; did you mean --freeze-lm?"),
    ],
)
def test_mistakes_are_one_line_at_once(mcore, tmp_path, changed, flags, said):
    dataset = tmp_path / "dataset"
    (dataset / ".nv-meta").mkdir(parents=True)
    (dataset / ".nv-meta" / "dataset.yaml").touch()
    arguments = train_arguments(
        tmp_path / "out", **{"PRETRAIN_CHECKPOINT_PATH": mcore, "DATASET_PATH": dataset, **changed}
    )
    before = processor_seconds()
    result = call("sh", TRAIN, *arguments, *flags, cwd=tmp_path)
    assert result.returncode != 0
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert processor_seconds() - before < 1.8  # half of it on a quiet machine; torch's import alone takes more


def test_speed_is_measured_without_weights(hf, tmp_path):
    """On mock data frozen parts may be random: a LLaVA's folder without its weights is enough."""
    description = shutil.copytree(hf, tmp_path / "llava", ignore=shutil.ignore_patterns("*.safetensors*"))
    output = tmp_path / "output"
    config = tiny_runs.config(None, output, model_config=description, data_path=MOCK, train_iters=2)
    assert train(config, 1).codes == [0]
    assert sorted(scalars(output, "samples-per-second")) == [1, 2]


def test_too_few_arguments_print_the_usage(tmp_path):
    result = call("sh", TRAIN, *train_arguments(tmp_path)[:22], cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: 22 arguments, expected 23:")
    assert "TRAIN_ITERS LR_WARMUP_ITERS OUTPUT_BASEPATH" in result.stderr
