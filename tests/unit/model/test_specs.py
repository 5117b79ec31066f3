"""Layers that are padded for fp8's kernels give what they give without."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.model.specs import padded


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
