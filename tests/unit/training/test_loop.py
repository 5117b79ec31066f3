"""What a run does when something is wrong."""

from __future__ import annotations

import contextlib
import itertools
import logging
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from megatron_patch.families.llava import read_config
from megatron_patch.training import loop
from megatron_patch.training import optimizer as optimizer_module
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.resume import Progress
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs


def test_a_loss_that_is_nan_stops_and_names_the_samples(mcore, tmp_path, one_process):
    config, llava = tiny_runs.config(mcore, tmp_path), read_config(mcore)
    (chunk,), wrapped, optimizer, _ = start_or_resume(config, llava)
    with torch.no_grad():
        chunk.vision_projection.encoder.linear_fc2.bias.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in chunk.state_dict().items() if tensor is not None}
    with pytest.raises(FloatingPointError, match="the loss of samples 0-0, 0-1 is NaN"):
        train_step(wrapped, optimizer, itertools.cycle(tiny_runs.batches(llava, 2)), batch_runner(config, llava))
    for name, tensor in before.items():
        torch.testing.assert_close(chunk.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_run_that_learns_nothing_from_its_data_ends(mcore, tmp_path, one_process, monkeypatch):
    config = tiny_runs.config(mcore, tmp_path, freeze_lm=True, freeze_vit=True, train_iters=21)
    batches = itertools.cycle(tiny_runs.batches(read_config(mcore), 2, pictures=((0, 0),)))
    stop = never_stops(tmp_path, monkeypatch, batches)
    with pytest.raises(ValueError, match=r"iteration 20: none of its 4 samples has an image"):
        loop.train(config)
    assert loop.readers._is_stopping == stop.is_asked


def never_stops(folder, monkeypatch, batches) -> Mock:
    """Have `loop.train` take these batches, without a loader and without signals; what stands for its Stop."""
    for name, given in (("open_data", None), ("reading", batches)):
        monkeypatch.setattr(loop, name, lambda *_, given=given: contextlib.nullcontext(given))
    (folder / "log").mkdir()
    stop = Mock(due=lambda: False, reason=None, exit_code=0)
    monkeypatch.setattr(loop, "Stop", lambda minutes: stop)
    monkeypatch.setattr(loop.readers, "_is_stopping", None)
    return stop


def test_a_run_that_is_done_trains_nothing_and_says_so(mcore, tmp_path, one_process, monkeypatch, caplog):
    config = tiny_runs.config(mcore, tmp_path, train_iters=5)
    never_stops(tmp_path, monkeypatch, iter(()))
    monkeypatch.setattr(loop, "start_or_resume", lambda *_: (*start_or_resume(*_)[:3], Progress(5, 20)))
    caplog.set_level(logging.INFO)
    assert loop.train(config) == 0
    assert "nothing to do: 5 iterations are done, and --train-iters asks for 5" in caplog.messages


def test_readers_have_begun_before_ranks_wait_for_each_other(mcore, tmp_path, one_process, monkeypatch):
    order, gather = [], dist.all_gather_object
    reads = Mock(shared_memory=0, begin=lambda: order.append("begun"))
    monkeypatch.setattr(loop, "train_loader", lambda *_, **__: reads)
    monkeypatch.setattr(dist, "all_gather_object", lambda *a, **b: order.append("waited") or gather(*a, **b))
    with loop.open_data(tiny_runs.config(mcore, tmp_path), read_config(mcore), None) as loader:
        assert loader is reads
    assert order == ["begun", "waited"]


def test_shared_memory_that_will_not_do_is_said_before_reading(mcore, tmp_path, one_process, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    order = []
    monkeypatch.setattr(loop.readers, "check_room", lambda size, count: order.append((size, count)))
    reads = Mock(shared_memory=70, begin=lambda: order.append("begun"))
    for name in ("train_loader", "valid_loader"):
        monkeypatch.setattr(loop, name, lambda *_, **__: reads)
    config = tiny_runs.config(mcore, tmp_path, valid_data_path=tmp_path)
    loop.begin_to_read(config, read_config(mcore), None)
    assert order == [(140, 3), "begun"]


def test_fp16_gradients_that_overflow_leave_the_weights_and_lower_the_scale(mcore, tmp_path, one_process, monkeypatch):
    monkeypatch.setattr(optimizer_module, "FIRST_LOSS_SCALE", 2.0**30)
    config, llava = tiny_runs.config(mcore, tmp_path, precision="fp16"), read_config(mcore)
    (chunk,), wrapped, optimizer, _ = start_or_resume(config, llava)
    before = chunk.vision_projection.encoder.linear_fc1.weight.clone()
    batches, run = itertools.cycle(tiny_runs.batches(llava, 2)), batch_runner(config, llava)
    steps = [train_step(wrapped, optimizer, batches, run) for _ in range(3)]
    assert [step.grad_norm for step in steps] == [None, None, None]
    assert [step.loss_scale for step in steps] == [2.0**30, 2.0**30, 2.0**29]
    assert torch.equal(chunk.vision_projection.encoder.linear_fc1.weight, before)
    assert steps[0].totals == steps[2].totals
