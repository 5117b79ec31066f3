"""What is asked of a GPU."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_patch.config.train import Parallel
from megatron_patch.model import groups


def test_what_torch_keeps_of_tensors_that_are_gone_is_free(monkeypatch):
    """The GPU is a mock: 80 bytes, of which tensors hold 30 and torch's cache 20."""
    cached = [20]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", cached.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 - 30 - sum(cached), 80))
    assert groups.free_memory() == 50


def test_without_a_gpu_there_is_nothing_to_ask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert groups.free_memory() is None


def test_every_group_gives_up_after_the_time_that_is_given(tmp_path):
    groups.start(Parallel(), 0, timeout_minutes=3, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        # Of experts, which no model here has, megatron.core makes one without the time.
        made = [group for name, group in vars(parallel_state).items() if "EXPERT" not in name]
        real = [group for group in (dist.group.WORLD, *made) if isinstance(group, dist.ProcessGroup)]
        assert len(real) > 10
        times = {group._get_backend(torch.device("cpu")).options._timeout for group in real}
        assert times == {timedelta(minutes=3)}
    finally:
        groups.stop()
