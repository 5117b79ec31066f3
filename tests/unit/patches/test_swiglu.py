"""SwiGLU where nothing is compiled, against autograd's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_autograd_to_the_bit_and_keeps_its_input_alone(dtype):
    given = torch.randn(5, 2, 16, dtype=dtype, requires_grad=True)
    gate, up = given.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    gradient = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, given, gradient)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = bias_swiglu_impl(given, None)
    assert torch.equal(output, expected)
    assert torch.equal(torch.autograd.grad(output, given, gradient)[0], expected_gradient)
    assert [tensor.data_ptr() for tensor in kept] == [given.data_ptr()]


@pytest.mark.parametrize("kept_otherwise", [{"fp8_input_store": True}, {"cpu_offload_input": True}], ids=str)
def test_what_is_not_there_is_refused(kept_otherwise):
    with pytest.raises(NotImplementedError, match="use a compiler"):
        bias_swiglu_impl(torch.zeros(1, 1, 2), None, **kept_otherwise)
