"""Rotations in few kernels against megatron.core's own."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from megatron_patch.patches.rotary import Recent
from tests.unit.patches.tiny_core import kernels

ROTATE, ROTATE_PACKED = rope_utils._apply_rotary_pos_emb_bshd, rope_utils._apply_rotary_pos_emb_thd


def angles(length: int, width: int) -> Tensor:
    """[length, 1, 1, width], as RotaryEmbedding makes them."""
    half = torch.outer(torch.arange(length).float(), 100.0 ** -torch.linspace(0, 1, width // 2))
    return torch.cat((half, half), dim=-1)[:, None, None, :]


def both(function, given: Tensor, *args, **kwargs) -> list[tuple[Tensor, Tensor]]:
    """Output and input gradient of the repaired function, then of the stock one."""
    results = []
    for rotate in (function, function.__wrapped__):
        leaf = given.detach().requires_grad_()
        output = rotate(leaf, *args, **kwargs)
        assert output.is_contiguous()
        assert output.dtype == given.dtype
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
        output.backward(gradient)
        results.append((output.detach(), leaf.grad))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [16, 8], ids=["all channels", "half of them"])
@pytest.mark.parametrize("mscale", [1.0, 1.25])
def test_equals_the_stock_one(dtype, width, mscale):
    """To 1e-6 in fp32; in 16 bits to one rounding of the products, which are at most 8 here."""
    torch.manual_seed(1)
    query = torch.randn(7, 2, 3, 32, dtype=dtype).clamp(-3, 3)[..., ::2]  # as a view of what linear_qkv gives
    new, stock = both(ROTATE, query, angles(7, width), mscale=mscale)
    tolerance = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for one, other in zip(new, stock, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_halves_may_have_different_angles():
    query, different = torch.randn(7, 2, 3, 16), torch.randn(7, 1, 1, 16)
    for one, other in zip(*both(ROTATE, query, different), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["rotary_interleaved", "multi_latent_attention"])
def test_other_rotations_are_the_stock_ones(kind):
    query = torch.randn(5, 2, 3, 8)
    for one, other in zip(*both(ROTATE, query, angles(5, 8), **{kind: True}), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("length", [8, 12], ids=["angles of the longest sample", "angles of all positions"])
def test_packed_samples(rank, size, length):
    """Of 4 and 8 positions, cut over context-parallel ranks."""
    group = mock.Mock(**{"rank.return_value": rank, "size.return_value": size})
    query, borders = torch.randn(12 // size, 3, 8), torch.tensor([0, 4, 12], dtype=torch.int32)
    new, stock = both(ROTATE_PACKED, query, borders, angles(length, 8), cp_group=group)
    for one, other in zip(new, stock, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_autograd_keeps_nothing_and_recomputation_takes_no_angles_again():
    """Recomputation hands over a detached tensor."""
    query, theta = torch.randn(5, 1, 3, 8, requires_grad=True), angles(5, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda packed: packed):
        ROTATE(query, theta)
    assert kept == []
    assert kernels(lambda: ROTATE(query, theta.detach())) == ["aten.mul", "aten.addcmul_", "aten.addcmul_"]


def test_angles_that_have_changed_are_taken_again():
    query, theta = torch.randn(5, 1, 3, 8), angles(5, 8)
    before = ROTATE(query, theta)
    theta.mul_(2)
    assert not torch.allclose(ROTATE(query, theta), before)
    torch.testing.assert_close(ROTATE(query, theta), ROTATE.__wrapped__(query, theta))


def test_few_results_are_remembered():
    recent, tensors = Recent(), [torch.zeros(1) for _ in range(2 * Recent.SIZE)]
    for number, tensor in enumerate(tensors):
        assert recent.get((tensor,), (), lambda number=number: number) == number
    assert recent.get((tensors[-1],), (), mock.Mock(side_effect=AssertionError)) == len(tensors) - 1
    assert len(recent.results) == Recent.SIZE
