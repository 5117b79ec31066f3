"""What a run does when something is wrong."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_patch import parallel
from megatron_patch.config import Parallel
from megatron_patch.families.llava import read_config
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs


@pytest.fixture
def one_process(tmp_path):
    parallel.start(Parallel(), seed=1, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    parallel.stop()


def test_a_loss_that_is_no_number_stops_and_names_the_samples(mcore, tmp_path, one_process):
    config, llava = tiny_runs.config(mcore, tmp_path), read_config(mcore)
    (chunk,), wrapped, optimizer, _, _ = start_or_resume(config, llava)
    with torch.no_grad():
        chunk.vision_projection.encoder.linear_fc2.bias.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in chunk.state_dict().items() if tensor is not None}
    with pytest.raises(FloatingPointError, match="the loss of samples 0-0, 0-1 is nan"):
        train_step(wrapped, optimizer, itertools.cycle(tiny_runs.batches(llava, 2)), batch_runner(config, llava))
    for name, tensor in before.items():
        torch.testing.assert_close(chunk.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)
