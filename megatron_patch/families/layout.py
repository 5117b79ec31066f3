"""How a row's tensors are laid out: merge Hugging Face's into megatron.core's, split again, cut and join over ranks.

Pure functions of tensors of any dtype. "Whole" is megatron.core's tensor before tensor parallelism. A `qkv` row must be
sized (`Weight.sized`), the others need not be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_patch.families.family import Weight


def merge(weight: Weight, tensors: Sequence[Tensor]) -> Tensor:
    """Hugging Face's tensors of one row -> megatron.core's whole tensor."""
    if weight.layout == "qkv":
        # [g * n * d, ...] each -> [g, (q heads of the group, k, v) * d, ...]
        groups = [tensor.unflatten(0, (weight.num_query_groups, -1)) for tensor in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if weight.layout == "gated":
        return torch.cat(list(tensors))
    (tensor,) = tensors
    return tensor.reshape(1, 1, -1) if weight.layout == "class_token" else tensor


def split(weight: Weight, whole: Tensor) -> tuple[Tensor, ...]:
    """The inverse of `merge`."""
    if weight.layout == "qkv":
        groups = whole.unflatten(0, (weight.num_query_groups, -1))
        queries = groups.shape[1] - 2 * weight.kv_channels
        parts = groups.split([queries, weight.kv_channels, weight.kv_channels], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)
    if weight.layout == "gated":
        return whole.chunk(2)
    return (whole.reshape(-1),) if weight.layout == "class_token" else (whole,)


def hf_shapes(weight: Weight) -> tuple[tuple[int, ...], ...]:
    """Shapes of Hugging Face's tensors of a sized row, in the order of its names."""
    return tuple(tuple(part.shape) for part in split(weight, torch.empty(weight.shape, device="meta")))


def pad_vocab(whole: Tensor, padded_vocab_size: int) -> Tensor:
    """Append zero rows up to `padded_vocab_size`."""
    return torch.cat([whole, whole.new_zeros(padded_vocab_size - whole.shape[0], *whole.shape[1:])])


def shard(weight: Weight, whole: Tensor, size: int) -> tuple[Tensor, ...]:
    """Every tensor-parallel rank's part of a (padded) whole tensor, in the order of ranks."""
    if weight.axis is None:
        return (whole,) * size
    blocks = whole.unflatten(weight.axis, (_num_blocks(weight), -1))
    return tuple(part.flatten(weight.axis, weight.axis + 1) for part in blocks.chunk(size, dim=weight.axis + 1))


def unshard(weight: Weight, shards: Sequence[Tensor]) -> Tensor:
    """The inverse of `shard`. Raises ValueError when ranks disagree on a replicated tensor."""
    if weight.axis is None:
        for rank, other in enumerate(shards):
            if not torch.equal(other, shards[0]):
                raise ValueError(f"{weight.mcore}: tensor-parallel ranks 0 and {rank} hold different values")
        return shards[0]
    blocks = [part.unflatten(weight.axis, (_num_blocks(weight), -1)) for part in shards]
    return torch.cat(blocks, dim=weight.axis + 1).flatten(weight.axis, weight.axis + 1)


def _num_blocks(weight: Weight) -> int:
    """Equal blocks along the cut axis, of which every rank gets a part: gate and up are two."""
    return 2 if weight.layout == "gated" else 1
