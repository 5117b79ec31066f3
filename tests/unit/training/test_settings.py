"""Settings that change how a step is computed, and not its result, are seen in what is computed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_patch.config.train import Parallel
from megatron_patch.families.llava import read_config
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("one_process")


def build(mcore, tmp_path, *, cut: Parallel | None = None, **changed):
    """Configuration, first layer of the language model, wrapped model, optimizer."""
    config = tiny_runs.config(mcore, tmp_path, parallel=cut, **changed)
    chunks, wrapped, optimizer, _ = start_or_resume(config, read_config(mcore))
    return config, chunks[0].language_model.decoder.layers[0], wrapped, optimizer


def count_calls(mcore, tmp_path, **changed) -> Counter:
    """How often a step computes a layer's attention and its feed-forward part, and for how many samples at once."""
    config, layer, wrapped, optimizer = build(mcore, tmp_path, **changed)
    calls = Counter()
    for name, module in {"attention": layer.self_attention.core_attention, "mlp": layer.mlp}.items():
        module.register_forward_pre_hook(lambda module, inputs, name=name: calls.update([(name, inputs[0].shape[1])]))
    llava = read_config(mcore)
    train_step(wrapped, optimizer, iter(tiny_runs.batches(llava, 2)), batch_runner(config, llava))
    return calls


@pytest.mark.parametrize(
    ("recompute", "attention", "mlp"),
    [("none", 1, 1), ("false", 1, 1), ("sel", 2, 1), ("true", 2, 1), ("full", 2, 2)],
)
def test_recompute(mcore, tmp_path, recompute, attention, mlp):
    calls = count_calls(mcore, tmp_path, recompute=recompute)
    assert calls == {("attention", 2): 2 * attention, ("mlp", 2): 2 * mlp}  # for each of two micro batches


def test_global_batch_size(mcore, tmp_path):
    assert count_calls(mcore, tmp_path, global_batch_size=2) == {("attention", 2): 1, ("mlp", 2): 1}


@pytest.mark.parametrize(("flash", "kind"), [(True, "SDPAttention"), (False, "DotProductAttention")])
def test_use_flash_attn(mcore, tmp_path, flash, kind):
    _, layer, _, _ = build(mcore, tmp_path, use_flash_attn=flash)
    assert type(layer.self_attention.core_attention).__name__ == kind


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_precision(mcore, tmp_path, precision, dtype):
    _, _, wrapped, optimizer = build(mcore, tmp_path, precision=precision)
    assert {parameter.dtype for parameter in wrapped[0].parameters()} == {dtype}
    assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {torch.float32}


@pytest.mark.parametrize("distributed", [True, False])
def test_use_distributed_optimizer(mcore, tmp_path, distributed):
    _, _, _, optimizer = build(mcore, tmp_path, cut=Parallel(use_distributed_optimizer=distributed))
    assert isinstance(optimizer.chained_optimizers[0], DistributedOptimizer) == distributed
