"""What a run does when something is wrong."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_patch.families.llava import read_config
from megatron_patch.training import optimizer as optimizer_module
from megatron_patch.training.loop import start_or_resume
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
