"""What autograd saves is copied, and weights are not."""

from __future__ import annotations

import torch

from megatron_patch.model import offload
from megatron_patch.model.offload import ActivationOffload


def gradients(monkeypatch, smallest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and input, both of which are 10 times as large in the backward pass as in the forward."""
    monkeypatch.setattr(offload, "SMALLEST", smallest)
    layer = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.ones_(layer.weight)
    given = torch.ones(2, 4, requires_grad=True)
    with ActivationOffload(layer):
        loss = layer(given).sum()
    with torch.no_grad():
        given.data.mul_(10)
        layer.weight.data.mul_(10)
    loss.backward()
    return layer.weight.grad, given.grad


def test_activations_are_copied_and_weights_are_used_as_they_are(monkeypatch):
    of_weight, of_input = gradients(monkeypatch, smallest=0)
    assert (of_weight == 2).all()  # the input as it was in the forward pass
    assert (of_input == 40).all()  # the weight as it is


def test_small_tensors_stay(monkeypatch):
    of_weight, _ = gradients(monkeypatch, smallest=9)
    assert (of_weight == 20).all()
