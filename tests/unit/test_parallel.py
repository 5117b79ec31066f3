"""What is asked of a GPU."""

from __future__ import annotations

import torch

from megatron_patch import parallel


def test_what_torch_keeps_of_tensors_that_are_gone_is_free(monkeypatch):
    """The GPU is a mock: 80 bytes, of which tensors hold 30 and torch's cache 20."""
    cached = [20]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", cached.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 - 30 - sum(cached), 80))
    assert parallel.free_memory() == 50


def test_without_a_gpu_there_is_nothing_to_ask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.free_memory() is None
