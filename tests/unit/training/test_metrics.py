"""What a run writes down, read back: TensorBoard, metrics.jsonl, the progress line."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from megatron_patch.estimate.flops import megatron_lm_flops, step_flops
from megatron_patch.families.llava import read_config
from megatron_patch.training.captions import Caption
from megatron_patch.training.metrics import Metrics, _open_lines
from megatron_patch.training.step import Step, Totals
from tests import tiny_runs
from tests.unit.properties import examples

TOTALS = Totals(
    loss=2.0,
    num_labels=40,
    num_samples=4,
    num_tokens=180,
    num_positions=192,
    num_pairs=4 * 48**2,
    num_images=4,
    num_truncated=1,
    data_seconds=0.1,
)
STEP = Step(totals=TOTALS, grad_norm=0.5, params_norm=7.0, loss_scale=1.0, seconds=0.8)


@pytest.fixture
def run(mcore, tmp_path, monkeypatch):
    """A function (first iteration, number of iterations, step) that logs them as a process would."""
    # Counts this process's event files in their names, by which files of one second are sorted: 10 would precede 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    (tmp_path / "log").mkdir()

    def log(first: int, count: int, step: Step = STEP, **changed):
        config = tiny_runs.config(mcore, tmp_path, **changed)
        metrics = Metrics(config, read_config(mcore), first_iteration=first, world_size=2, is_writer=True)
        for iteration in range(first, first + count):
            metrics.log(iteration, step, learning_rate=1e-3, consumed_samples=4 * iteration)
        metrics.log_validation(first + count - 1, TOTALS)
        metrics.flush()
        return config

    return log


def read(folder):
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    return board


def test_scalars_have_megatron_lms_names(run, mcore, tmp_path):
    config = run(1, 3)
    flops = sum(step_flops(read_config(mcore), config.model, TOTALS).values())
    expected = {
        "lm loss": 2.0,
        "learning-rate": 1e-3,
        "loss-scale": 1.0,
        "grad-norm": 0.5,
        "params-norm": 7.0,
        "batch-size": 4,
        "iteration-time": 0.8,
        "batch-generator-time": 0.1,
        "data-wait-percent": 12.5,
        "throughput": flops / 0.8 / 2 / 1e12,
        "throughput-megatron-lm": megatron_lm_flops(read_config(mcore), TOTALS) / 0.8 / 2 / 1e12,
        "samples-per-second": 5.0,
        "tokens-per-second": 225.0,
        "cut-samples": 1,
        "consumed-samples": 12,
        "lm loss validation": 2.0,
        "lm loss validation ppl": 7.389056,
    }
    board = read(tmp_path)
    last = {name: board.Scalars(name)[-1] for name in board.Tags()["scalars"]}
    assert 50e6 < last.pop("mem-rss-bytes").value < 50e9
    assert {name: event.value for name, event in last.items()} == pytest.approx(expected)
    assert {event.step for event in last.values()} == {3}
    lines = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line} == {"iteration", "mem-rss-bytes", *expected}


def test_a_resumed_run_replaces_what_a_killed_one_wrote(run, tmp_path):
    run(1, 5)
    with (tmp_path / "log" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "lm lo')  # killed while writing
    run(4, 3, replace(STEP, totals=replace(TOTALS, loss=1.0)), seed=5)
    board = read(tmp_path)
    assert [(e.step, e.value) for e in board.Scalars("lm loss")] == [(1, 2), (2, 2), (3, 2), (4, 1), (5, 1), (6, 1)]
    lines = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "batch-size" in line] == [1, 2, 3, 4, 5, 4, 5, 6]
    settings = {event.step: event.tensor_proto.string_val[0].decode() for event in board.Tensors("config/text_summary")}
    assert settings.keys() == {1, 4}
    for step, seed in ((1, 1234), (4, 5)):
        assert json.loads(settings[step].removeprefix("```json").removesuffix("```"))["training"]["seed"] == seed


@pytest.mark.parametrize("wait", [0.039, 0.041])
def test_the_line_is_short_and_says_when_data_is_late(run, caplog, monkeypatch, wait):
    monkeypatch.setattr(logging.getLogger("megatron_patch"), "propagate", True)
    totals = replace(TOTALS, num_tokens=98_765_432, data_seconds=wait)
    with caplog.at_level(logging.INFO):
        run(198_000, 1, replace(STEP, totals=totals, grad_norm=12345.678), train_iters=1_000_000)
    line = caplog.messages[0]
    assert line.startswith("iteration  198000/1000000 | lm loss: 2.000000 | lr: 1.0000E-03 | grad norm: 12345.6780 | ")
    assert ("data wait: 5.1%" in line) == (wait > 0.04)
    assert len(line) < 200


def test_captions_stand_beside_the_very_picture(run, mcore, tmp_path):
    run(1, 1)
    picture = torch.randint(0, 256, (3, 28, 56), dtype=torch.uint8)
    metrics = Metrics(
        tiny_runs.config(mcore, tmp_path), read_config(mcore), first_iteration=2, world_size=1, is_writer=True
    )
    for iteration, said in ((2, "a <blob>"), (4, "a\n\x1b[2Jdog")):
        metrics.log_captions(iteration, [Caption("a/1", picture, "a *dog*", said), Caption("b", None, "yes", "no")])
    metrics.flush()
    board = read(tmp_path)
    (image,) = board.Images("captions/a/1")
    assert image.step == 2
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), picture.permute(1, 2, 0))
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("captions/a/1/text_summary")]
    assert texts == [f"    model:     {said}\n    reference: a *dog*" for said in ("a <blob>", r"a \x1b[2Jdog")]
    assert board.Tags()["images"] == ["captions/a/1"]


@pytest.mark.parametrize(
    "left",
    [b"", b"\xff\xfe\x80\n", b'{"iteration": 3, "lm', bytes(200_000), b"\xff" * 70_000 + b"\n" + b"half", b"\r\r"],
)
def test_lines_behind_what_a_crash_left(left, tmp_path):
    """Whole lines stay as they are, of whatever bytes; what comes after the last one goes."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n' + left)
    with _open_lines(path) as file:
        file.write('{"iteration": 2}\n')
    assert path.read_bytes() == b'{"iteration": 1}\n' + left[: left.rfind(b"\n") + 1] + b'{"iteration": 2}\n'


def test_a_folder_in_the_place_of_the_lines(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics\.jsonl: cannot be written \(Is a directory\)"):
        _open_lines(tmp_path / "metrics.jsonl")


@examples
@given(st.lists(st.binary(max_size=30) | st.sampled_from([b"\n", bytes(70_000)]), max_size=5).map(b"".join))
def test_any_lines_are_gone_on_from(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    _open_lines(path).close()
    assert path.read_bytes() == data[: data.rfind(b"\n") + 1]
