"""What is handed to torch's attention, and in which layout its output comes back."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from megatron_patch.model import attention
from megatron_patch.model.attention import SDPAttention
from tests.unit.patches.cases import kernels

SDPA = F.scaled_dot_product_attention
S, B, HEADS, GROUPS, D = 16, 2, 4, 2, 8


def module() -> SDPAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * D, num_attention_heads=HEADS, num_query_groups=GROUPS, attention_dropout=0.0
    )
    return SDPAttention(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")


def on_rank(rank: int, size: int, key: Tensor, value: Tensor, monkeypatch: pytest.MonkeyPatch) -> SDPAttention:
    """The module on a context-parallel rank, to which the others' keys and values come without a process group."""
    sharded = module()
    sharded.context_group = mock.Mock(**{"rank.return_value": rank, "size.return_value": size})
    gathered = iter([torch.stack([pieces(tensor, each, size) for each in range(size)]) for tensor in (key, value)])
    monkeypatch.setattr(attention._Gather, "apply", lambda part, group: next(gathered))
    return sharded


def pieces(tensor: Tensor, rank: int, size: int) -> Tensor:
    """A rank's two of 2 * size pieces of [s, ...]."""
    parts = tensor.chunk(2 * size)
    return torch.cat([parts[rank], parts[-1 - rank]])


@pytest.mark.parametrize("rank", [0, 1])
def test_context_parallel_ranks_hand_over_no_mask_tensor(rank, monkeypatch):
    """A name instead, which a GPU's flash attention takes; output and gradients are those of the whole sequence.

    To float32's rounding: the same sums are taken in another order.
    """
    query, key, value = (torch.randn(S, B, heads, D, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS))
    whole = pieces(module()(query, key, value, None), rank, 2)
    gradient = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, (query, key, value), gradient)

    sharded = on_rank(rank, 2, key, value, monkeypatch)
    masks = []

    def record(*args, **kwargs):
        masks.append(kwargs["attn_mask"])
        return SDPA(*args, **kwargs)

    monkeypatch.setattr(attention, "F", mock.Mock(scaled_dot_product_attention=record))
    output = sharded(pieces(query, rank, 2), pieces(key, rank, 2), pieces(value, rank, 2), None)
    assert [type(mask) for mask in masks] == [CausalBias, CausalBias]
    torch.testing.assert_close(output, whole, rtol=0, atol=1e-5)
    for one, other in zip(torch.autograd.grad(output, (query, key, value), gradient), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_next_layer_takes_one_matrix_product(monkeypatch):
    """Also when the kernel's output is [b, s, n, d] in memory, as the memory-efficient one's is, which needs a GPU."""

    def memory_efficient(query, key, value, **kwargs):
        return SDPA(query, key, value, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    query, key, value = (torch.randn(S, B, heads, D) for heads in (HEADS, GROUPS, GROUPS))
    weight = torch.randn(8, HEADS * D)
    expected = module()(query, key, value, None)
    monkeypatch.setattr(attention, "F", mock.Mock(scaled_dot_product_attention=memory_efficient))
    output = module()(query, key, value, None)
    assert torch.equal(output, expected)
    assert "aten.bmm" not in kernels(lambda: output.matmul(weight.t()))


def test_the_mask_of_a_call_is_followed():
    """megatron.core asks for none where a query comes after the keys that it sees, which a causal one would hide."""
    query, key, value = (torch.randn(S, B, heads, D) for heads in (HEADS, GROUPS, GROUPS))
    last = module()(query, key, value, None)[-1:]
    alone = module()(query[-1:], key, value, None, attn_mask_type=AttnMaskType.no_mask)
    torch.testing.assert_close(alone, last, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="1 queries for 16 keys"):
        module()(query[-1:], key, value, None)
    with pytest.raises(ValueError, match="attn_mask_type padding is not supported"):
        module()(query, key, value, None, attn_mask_type=AttnMaskType.padding)


def test_context_parallelism_refuses_a_call_without_mask(monkeypatch):
    query, key, value = (torch.randn(S, B, heads, D) for heads in (HEADS, GROUPS, GROUPS))
    with pytest.raises(ValueError, match="context parallelism is for causal attention"):
        on_rank(0, 2, key, value, monkeypatch)(query, key, value, None, attn_mask_type=AttnMaskType.no_mask)
