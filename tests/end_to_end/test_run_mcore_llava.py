"""The training script: real photographs from folder to curve, across a kill; and mistakes answered at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.end_to_end.scripts import (
    CONVERT_DATA,
    CONVERT_MODEL,
    PHOTOS,
    TRAIN,
    call,
    environment,
    processor_seconds,
    scalars,
    train_arguments,
)
from tests.tiny import save_clip, save_mistral

ITERATIONS = 18
KILLED_AFTER = 9
SAVE_INTERVAL = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a space in its name."""
    return tmp_path_factory.mktemp("a place", numbered=True)


@pytest.fixture(scope="module")
def photos(place) -> Path:
    if not PHOTOS.is_dir():
        pytest.skip(f"{PHOTOS.name} is not beside this checkout")
    folder = place / "LLaVA Pretrain"
    shutil.copytree(PHOTOS, folder)
    result = call("python", CONVERT_DATA, folder, cwd=place)
    assert result.returncode == 0, result.stderr
    return folder / "wds"


@pytest.fixture(scope="module")
def weights(place) -> Path:
    """A small Mistral with the real v3 tokenizer and a small CLIP at 336 pixels, converted to PP2."""
    llm = save_mistral(place / "a mistral", vocab_size=32768, hidden_size=48, head_dim=8, intermediate_size=64)
    for file in llm.glob("tokenizer*"):
        file.unlink()
    tokenizer = files("mistral_common") / "data/mistral_instruct_tokenizer_240323.model.v3"
    (llm / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    (llm / "tokenizer_config.json").write_text(json.dumps(settings))
    clip = save_clip(place / "a clip", image_size=336, patch_size=14, hidden_size=32, intermediate_size=64)
    result = call("bash", CONVERT_MODEL, "auto", llm, clip, place / "weights pp2", 1, 2, "false", "fp32", cwd=place)
    assert result.returncode == 0, result.stderr
    return place / "weights pp2"


def logged_losses(text: str) -> dict[int, str]:
    return {int(i): loss for i, loss in re.findall(r"iteration +(\d+)/.*?lm loss: ([0-9.]+)", text)}


def kill_a_worker_after(iteration: int, process: subprocess.Popen) -> str:
    """SIGKILL for one rank when this iteration was logged; what was printed until the end."""
    printed = ""
    for line in process.stdout:
        printed += line
        if max(logged_losses(printed), default=0) >= iteration:
            break
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    return printed + process.stdout.read()


def test_photographs_through_all_scripts_across_a_kill(place, photos, weights):
    """18 iterations on PP2, a worker killed on the way: resumed, the curve is the one of an unbroken run."""
    output = place / "the output"
    command = [
        "sh",
        TRAIN,
        *train_arguments(
            output,
            SEQ_LEN=576,
            DECODER_SEQ_LEN=640,
            PP=2,
            LR=3e-3,
            SAVE_INTERVAL=SAVE_INTERVAL,
            DATASET_PATH=photos,
            VALID_DATASET_PATH=photos,
            PRETRAIN_CHECKPOINT_PATH=weights,
            TRAIN_ITERS=ITERATIONS,
            LR_WARMUP_ITERS=3,
        ),
        *("--freeze-lm", "false", "--eval-iters", "2", "--log-captions", "1", "--num-workers", "1"),
    ]
    command = [str(word) for word in command]
    process = subprocess.Popen(
        command, cwd="/", env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killed = kill_a_worker_after(KILLED_AFTER, process)
    assert process.wait(60) == 1
    assert re.search(r"error: rank \d ended with signal SIGKILL; see .*log", killed), killed

    resumed = call(*command, cwd="/")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"resumed from {output}/checkpoint/iter_{SAVE_INTERVAL:07d} at iteration {SAVE_INTERVAL}" in resumed.stdout

    assert "corrupted" not in killed + resumed.stdout  # what megatron.core would say of a folder that we made

    before, after = logged_losses(killed), logged_losses(resumed.stdout)
    again = before.keys() & after.keys()
    assert len(again) >= 3
    assert all(before[iteration] == after[iteration] for iteration in again)

    curve = scalars(output, "lm loss")
    assert sorted(curve) == list(range(1, ITERATIONS + 1))
    for iteration, loss in {**before, **after}.items():
        assert curve[iteration] == pytest.approx(float(loss), abs=1e-5)
    assert sum(curve[i] for i in range(ITERATIONS - 4, ITERATIONS + 1)) / 5 < curve[1] - 0.5
    rates = scalars(output, "learning-rate")
    assert rates[3] == pytest.approx(3e-3)
    assert rates[ITERATIONS] == pytest.approx(1e-4)
    assert scalars(output, "lm loss validation").keys() == {ITERATIONS}


def stopped_by(number: signal.Signals, iteration: int, command: list[str]) -> tuple[int, int]:
    """Exit code and last iteration of a run that gets this signal when `iteration` was logged."""
    process = subprocess.Popen(
        command, cwd="/", env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed = ""
    for line in process.stdout:
        printed += line
        if iteration in logged_losses(printed):
            process.send_signal(number)
            break
    printed += process.stdout.read()
    code = process.wait(60)
    (stopped,) = re.findall(rf"stopped by {number.name} after iteration (\d+); the same command goes on", printed)
    return code, int(stopped)


def test_a_signal_saves_and_the_run_goes_on(photos, mcore, tmp_path):
    """The step that the signal comes in is finished and saved, long before the interval; one that is through stays."""
    command = [
        "sh",
        TRAIN,
        *train_arguments(
            tmp_path / "out", DATASET_PATH=photos, PRETRAIN_CHECKPOINT_PATH=mcore, TRAIN_ITERS=500, SAVE_INTERVAL=500
        ),
        *("--num-workers", "1", "--keep-checkpoints", "1"),
    ]
    command = [str(word) for word in command]
    last = 3
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        ended, last = stopped_by(number, last, command)
        assert ended == code
        assert [path.name for path in (tmp_path / "out/checkpoint").glob("iter_*")] == [f"iter_{last:07d}"]
        last += 2

    resumed = call(*command, "--train-iters", last, cwd="/")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert sorted(logged_losses(resumed.stdout)) == [last - 1, last]
    assert [path.name for path in (tmp_path / "out/checkpoint").glob("iter_*")] == [f"iter_{last:07d}"]
    lines = [json.loads(line) for line in (tmp_path / "out/log/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, last + 1))

    again = call(*command, "--train-iters", last, cwd="/")
    assert again.returncode == 0, again.stderr
    assert f"nothing to do: {last} iterations are done" in again.stdout + again.stderr
    assert not logged_losses(again.stdout)


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
    arguments = train_arguments(output, DATASET_PATH="mock", PRETRAIN_CHECKPOINT_PATH="none", TRAIN_ITERS=2)
    result = call("sh", TRAIN, *arguments, "--model-config", description, cwd="/")
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(scalars(output, "samples-per-second")) == [1, 2]


def test_too_few_arguments_print_the_usage(tmp_path):
    result = call("sh", TRAIN, *train_arguments(tmp_path)[:22], cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: 22 arguments, expected 23:")
    assert "TRAIN_ITERS LR_WARMUP_ITERS OUTPUT_BASEPATH" in result.stderr
