"""Activations that go to the CPU and come back, on streams of their own, are what they were and free memory."""

from __future__ import annotations

import contextlib

import pytest
import torch

from megatron_patch.model.offload import ActivationOffload
from tests.distributed.matrix import Case, compute

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m gpu")


def test_gradients_are_those_without_in_less_memory():
    """Sixteen layers of 64 MiB, which are computed faster than copied; three rounds, so that memory is reused."""
    torch.manual_seed(1)
    layers = torch.nn.Sequential(
        *[torch.nn.Sequential(torch.nn.Linear(1024, 1024, bias=False), torch.nn.GELU()) for _ in range(16)]
    ).cuda()
    given, found, peaks = torch.randn(16384, 1024, device="cuda"), [], []
    for make in (contextlib.nullcontext, lambda: ActivationOffload(layers)):
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            with make():
                loss = layers(given).square().mean()
            gradients = torch.autograd.grad(loss, list(layers.parameters()))
            del loss
        found.append(gradients)
        peaks.append(torch.cuda.max_memory_allocated())
    for plain, offloaded in zip(*found, strict=True):
        assert torch.equal(plain, offloaded)
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.parametrize("run", ["projector", "everything"])
def test_training_is_that_without(mcore, tmp_path, run):
    case = Case("activation offload", changed={"recompute": "offload", "transformer_impl": "local"})
    plain = Case("local layers", changed={"transformer_impl": "local"})
    found = compute([(plain, run), (case, run)], mcore, tmp_path)
    (expected,), (report,) = found.values()
    assert torch.tensor(report).flatten().tolist() == pytest.approx(
        torch.tensor(expected).flatten().tolist(), rel=1e-5
    )  # losses and gradient norms
