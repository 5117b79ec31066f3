"""However the model and the batch are cut, the losses are those of one process."""

from __future__ import annotations

import itertools

import pytest
import torch
from megatron.core import parallel_state

from megatron_patch.config import Config, Parallel
from megatron_patch.families.llava import read_config
from megatron_patch.model import offload
from megatron_patch.training.loop import build_model, start_or_resume
from megatron_patch.training.optimizer import build_scheduler
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs
from tests.distributed.ranks import run_ranks

STEPS = 5


def train(config: Config) -> list[tuple[float, float]]:
    """Losses and gradient norms of a few steps on the same two micro batches."""
    llava = read_config(config.model.description)
    _, wrapped, optimizer, _, _ = start_or_resume(config, llava)
    scheduler = build_scheduler(optimizer, config, 0)
    mine = tiny_runs.batches(llava, 2)[
        parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()
    ]
    batches = itertools.cycle(mine)
    run = batch_runner(config, llava)
    reports = []
    for _ in range(STEPS):
        scheduler.step(1)
        step = train_step(wrapped, optimizer, batches, run)
        reports.append((step.totals.loss, step.grad_norm))
    return reports


def train_with_everything_offloaded(config: Config) -> list[tuple[float, float]]:
    """The same with no activation too small to be moved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "SMALLEST", 0)
        return train(config)


def run(mcore, tmp_path, world_size=1, changed=(), function=train, **sizes):
    cut = Parallel(**sizes)
    config = tiny_runs.config(mcore, tmp_path, parallel=cut, **dict(changed))
    return run_ranks(function, cut, world_size, config)


@pytest.fixture(scope="module")
def one_process(mcore, tmp_path_factory):
    (reports,) = run(mcore, tmp_path_factory.mktemp("one"))
    assert reports[-1][0] < reports[0][0] - 0.5
    return reports


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": False}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        (2, {"context_parallel_size": 2}),
        (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2}),
        (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        (4, {"context_parallel_size": 2, "use_distributed_optimizer": True}),
        (2, {"use_distributed_optimizer": False}),
        (2, {"use_distributed_optimizer": True}),
    ],
    ids=[
        "TP2+SP",
        "TP2",
        "PP2",
        "PP2xVPP2",
        "TP2xPP2+SP",
        "CP2",
        "CP2xTP2+SP",
        "CP2xPP2",
        "DP2xCP2+DO",
        "DP2",
        "DP2+DO",
    ],
)
def test_losses_equal_one_process(mcore, tmp_path, one_process, world_size, sizes):
    for reports in run(mcore, tmp_path, world_size, **sizes):
        for (loss, grad_norm), (expected_loss, expected_norm) in zip(reports, one_process, strict=True):
            assert loss == pytest.approx(expected_loss, abs=1e-5)
            assert grad_norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize(
    ("recompute", "method", "num_layers"),
    [("sel", None, None), ("full", None, None), ("full", "uniform", 2), ("full", "block", 3)],
)
def test_recomputing_changes_nothing(mcore, tmp_path, one_process, recompute, method, num_layers):
    changed = {"recompute": recompute, "recompute_method": method, "recompute_num_layers": num_layers}
    (reports,) = run(mcore, tmp_path, changed=changed.items())
    assert [loss for loss, _ in reports] == pytest.approx([loss for loss, _ in one_process], abs=1e-5)


@pytest.mark.parametrize(("world_size", "sizes"), [(1, {}), (2, {"pipeline_model_parallel_size": 2})], ids=["1", "PP2"])
def test_offloading_activations_changes_nothing(mcore, tmp_path, one_process, world_size, sizes):
    changed = {"recompute": "offload"}.items()
    for reports in run(mcore, tmp_path, world_size, changed, train_with_everything_offloaded, **sizes):
        assert [loss for loss, _ in reports] == pytest.approx([loss for loss, _ in one_process], abs=1e-5)


def test_frozen_stage_without_trained_weights(mcore, tmp_path):
    """Only the projector trains: the second stage has nothing to step, and the loss is the same."""
    frozen = {"freeze_lm": True, "freeze_vit": True}.items()
    (expected,) = run(mcore, tmp_path, changed=frozen)
    assert expected[-1][0] < expected[0][0]
    for reports in run(mcore, tmp_path, 2, changed=frozen, pipeline_model_parallel_size=2):
        assert [loss for loss, _ in reports] == pytest.approx([loss for loss, _ in expected], abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_are_near_fp32(mcore, tmp_path, one_process, precision):
    (reports,) = run(mcore, tmp_path, changed={"precision": precision}.items())
    assert [loss for loss, _ in reports] == pytest.approx([loss for loss, _ in one_process], abs=1e-2)


def new_layers(config: Config) -> list[torch.Tensor]:
    """A weight of each of this stage's layers, as they are drawn."""
    (chunk,) = build_model(config, read_config(config.model.description))
    return [layer.mlp.linear_fc2.weight.detach() for layer in chunk.language_model.decoder.layers]


def test_new_layers_differ_on_all_stages(mcore, tmp_path):
    cut = Parallel(pipeline_model_parallel_size=2)
    config = tiny_runs.config(None, tmp_path, parallel=cut, model_config=mcore)
    layers = [weight for stage in run_ranks(new_layers, cut, 2, config) for weight in stage]
    assert len(layers) == 4
    for one, other in itertools.combinations(layers, 2):
        assert not torch.equal(one, other)
