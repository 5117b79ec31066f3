"""torch's AdamW steps in one kernel, whatever a checkpoint says."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megatron_patch.config.train import Parallel
from megatron_patch.families.llava import read_config
from megatron_patch.training import resume
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.resume import Progress
from megatron_patch.training.saving import Saver
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("one_process")


def inner_optimizer(optimizer) -> torch.optim.Optimizer:
    """The one that steps."""
    (part,) = optimizer.chained_optimizers
    return part.optimizer


def assert_steps_are_fused(wrapped, optimizer, config, llava) -> None:
    """A step hands every trained weight to the fused kernel."""
    with mock.patch.object(torch, "_fused_adamw_", wraps=torch._fused_adamw_) as kernel:
        train_step(wrapped, optimizer, iter(tiny_runs.batches(llava, 2)), batch_runner(config, llava))
    stepped = sum(len(call.args[0]) for call in kernel.call_args_list)
    assert stepped == sum(parameter.requires_grad for parameter in wrapped[0].parameters())


@pytest.mark.parametrize("distributed", [True, False])
def test_fused_from_the_first_step_and_after_a_load_of_what_was_not(mcore, tmp_path, distributed):
    config = tiny_runs.config(mcore, tmp_path, parallel=Parallel(use_distributed_optimizer=distributed))
    llava = read_config(mcore)
    chunks, wrapped, optimizer, _ = start_or_resume(config, llava, None)
    assert_steps_are_fused(wrapped, optimizer, config, llava)
    for group in inner_optimizer(optimizer).param_groups:
        group["fused"] = None  # as checkpoints have it that were saved before
    Saver(config, chunks, optimizer).save(Progress(1, 0), None)
    _, wrapped, optimizer, progress = start_or_resume(config, llava, resume.find(config))
    assert progress.iteration == 1
    assert_steps_are_fused(wrapped, optimizer, config, llava)
    assert {state["step"].item() for state in inner_optimizer(optimizer).state.values()} == {2.0}
