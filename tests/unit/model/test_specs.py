"""Layers that are padded for fp8's kernels give what they give without; a norm does what its settings say."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.model.specs import TorchNorm, padded


def test_padding_comes_to_nothing(one_process):
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    results = []
    for kind in (ColumnParallelLinear, padded(ColumnParallelLinear)):
        layer = kind(8, 4, config=config, init_method=torch.nn.init.zeros_)
        numbers = torch.Generator().manual_seed(1)
        layer.weight.data.normal_(generator=numbers)
        tokens = torch.randn(17, 2, 8, generator=numbers).requires_grad_()
        output, _ = layer(tokens)
        (output**2).sum().backward()
        results.append((output.detach(), tokens.grad, layer.weight.grad, layer.bias.grad))
    for plain, with_padding in zip(*results, strict=True):
        torch.testing.assert_close(with_padding, plain)


@pytest.mark.parametrize(
    "setting", ["layernorm_zero_centered_gamma", "persist_layer_norm", "memory_efficient_layer_norm"]
)
def test_a_norm_refuses_what_it_would_not_do(setting):
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **{setting: True})
    with pytest.raises(ValueError, match=f"{setting}: torch's norm has no such thing"):
        TorchNorm(config, 8)
