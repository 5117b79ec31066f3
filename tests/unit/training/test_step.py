"""One training step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_patch.families.llava import read_config
from megatron_patch.training import batch as batch_module
from megatron_patch.training import step as step_module
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs

aten = torch.ops.aten
WAITS = (aten.nonzero.default, aten._local_scalar_dense.default)
"""What the host waits for a GPU in: a size, or a number, that follows from what lies there."""


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, if all tensors were there."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS or self._is_masked(func, args):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_masked(func, args: tuple) -> bool:
        """Indexing with a mask, but for `x[mask] = number`, which is a masked_fill."""
        if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
            return False
        is_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return is_mask and (func.overloadpacket is aten.index or args[2].numel() > 1)


def waits_in_a_step(config, num_micro_batches: int, monkeypatch) -> Counter[str]:
    llava = read_config(config.model.description)
    config = replace(config, data=replace(config.data, global_batch_size=2 * num_micro_batches))
    _, wrapped, optimizer, _ = start_or_resume(config, llava)
    run, batches = batch_runner(config, llava), iter(tiny_runs.batches(llava, 2 * num_micro_batches))
    train_step(wrapped, optimizer, batches, run)  # what is made once is made
    mode = Waits()
    on_host = []

    def outside(function):
        def call(*args, **named):
            before = mode.counts.copy()
            result = function(*args, **named)
            on_host.append(mode.counts - before)
            mode.counts = before
            return result

        return call

    # These have the text while it is on the CPU.
    for name in ("shard_sequence", "place_images", "place_labels", "count"):
        monkeypatch.setattr(step_module, name, outside(getattr(batch_module, name)))
    with mode:
        train_step(wrapped, optimizer, batches, run)
    monkeypatch.undo()
    assert any(on_host), "the mode sees what it is to count"
    return mode.counts


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("frozen", [False, True], ids=["everything", "projector"])
def test_the_host_waits_once_per_iteration_at_most(mcore, tmp_path, monkeypatch, frozen):
    """However many micro batches a step has: for a GPU they are queued one after the other."""
    config = tiny_runs.config(mcore, tmp_path, freeze_lm=frozen, freeze_vit=frozen)
    few, many = (waits_in_a_step(config, count, monkeypatch) for count in (1, 4))
    assert many == few
