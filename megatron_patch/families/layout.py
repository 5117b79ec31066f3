"""How a row's tensors are laid out: merge Hugging Face's into megatron.core's, split again, shard and join over ranks.

Pure functions, of a torch.Tensor of any dtype as well as of a `tensor_io.view.View`, which says where on the disk a
tensor's values lie: both have `shape`, `narrow`, `reshape` and `new_zeros`. So the plan of a conversion and the
conversion itself are the same few lines. "Whole" is megatron.core's tensor before tensor parallelism. A `qkv` row must
be sized (`Weight.sized`), the others need not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_patch.families.table import Weight
from megatron_patch.tensor_io.view import View

if TYPE_CHECKING:
    from typing_extensions import Self


class Values(Protocol):
    """What a torch.Tensor and a `View` have in common."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def narrow(self, axis: int, start: int, length: int, /) -> Self: ...

    def reshape(self, *shape: int) -> Self: ...

    def new_zeros(self, *shape: int) -> Self: ...


T = TypeVar("T", bound=Values)


def merge(weight: Weight, tensors: Sequence[T]) -> T:
    """Hugging Face's tensors of one row -> megatron.core's whole tensor."""
    if weight.layout == "qkv":
        # [g * n * d, ...] each -> [g, (q heads of the group, k, v) * d, ...]
        per_group = zip(*(_slices(tensor, weight.num_query_groups) for tensor in tensors), strict=True)
        return _join([part for group in per_group for part in group])
    if weight.layout == "gated":
        return _join(tensors)
    (tensor,) = tensors
    return tensor.reshape(1, 1, -1) if weight.layout == "class_token" else tensor


def split(weight: Weight, whole: T) -> tuple[T, ...]:
    """The inverse of `merge`."""
    if weight.layout == "qkv":
        queries = whole.shape[0] // weight.num_query_groups - 2 * weight.kv_channels
        sizes = [queries, weight.kv_channels, weight.kv_channels]
        groups = [_slices_of(group, sizes) for group in _slices(whole, weight.num_query_groups)]
        return tuple(_join(parts) for parts in zip(*groups, strict=True))
    if weight.layout == "gated":
        return tuple(_slices(whole, 2))
    return (whole.reshape(-1),) if weight.layout == "class_token" else (whole,)


def pad_vocab(whole: T, padded_vocab_size: int) -> T:
    """Append zero rows up to `padded_vocab_size`."""
    return _join([whole, whole.new_zeros(padded_vocab_size - whole.shape[0], *whole.shape[1:])])


def shard(weight: Weight, whole: T, size: int) -> tuple[T, ...]:
    """Every tensor-parallel rank's part of a (padded) whole tensor, in the order of ranks."""
    if weight.axis is None:
        return (whole,) * size
    blocks = [_slices(block, size, weight.axis) for block in _slices(whole, _num_blocks(weight), weight.axis)]
    return tuple(_join(parts, weight.axis) for parts in zip(*blocks, strict=True))


def unshard(weight: Weight, shards: Sequence[T]) -> T:
    """The inverse of `shard`. Raises ValueError when ranks disagree on a replicated tensor; views are not read."""
    if weight.axis is None:
        if tensors := [part for part in shards if isinstance(part, Tensor)]:
            check_replicas(weight, tensors)
        return shards[0]
    blocks = zip(*(_slices(part, _num_blocks(weight), weight.axis) for part in shards), strict=True)
    return _join([part for block in blocks for part in block], weight.axis)


def check_replicas(weight: Weight, replicas: Sequence[Tensor]) -> None:
    """Raise ValueError when tensor-parallel ranks disagree on a replicated tensor. Bytes count: a NaN equals itself."""
    first, *others = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in replicas)
    for rank, other in enumerate(others, start=1):
        if not torch.equal(other, first):
            raise ValueError(f"{weight.mcore}: tensor-parallel ranks 0 and {rank} hold different values")


def ranges(weight: Weight, length: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Which part of a whole tensor's sharded axis (`length` long) a rank holds: one range, or one of gate and of up."""
    count = _num_blocks(weight)
    block, part = length // count, length // count // size
    return [(i * block + rank * part, i * block + (rank + 1) * part) for i in range(count)]


def runs(weight: Weight, num_rows: int) -> list[int]:
    """Lengths of the runs of rows of a shard (or a whole tensor) that come from one Hugging Face tensor each.

    Every conversion, at any parallel sizes, reads and writes each run from its first row to its last, so that a run is
    what can be hashed while it passes.
    """
    if weight.layout == "gated":
        return [num_rows // 2] * 2
    if weight.layout == "qkv":
        group = weight.shape[0] // weight.num_query_groups
        return [group - 2 * weight.kv_channels, weight.kv_channels, weight.kv_channels] * (num_rows // group)
    return [num_rows]


def _num_blocks(weight: Weight) -> int:
    """Equal blocks along the sharded axis, of which every rank gets a part: gate and up are two."""
    return 2 if weight.layout == "gated" else 1


def _slices(tensor: T, count: int, axis: int = 0) -> list[T]:
    length, rest = divmod(tensor.shape[axis], count)
    if rest:
        raise ValueError(f"shape {list(tensor.shape)}: axis {axis} is not a multiple of {count}")
    return _slices_of(tensor, [length] * count, axis)


def _slices_of(tensor: T, lengths: Sequence[int], axis: int = 0) -> list[T]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [tensor.narrow(axis, start, length) for start, length in zip(starts, lengths, strict=True)]


def _join(parts: Sequence[T], axis: int = 0) -> T:
    tensors: Any = parts  # all of them the one or the other, which no checker can see
    joined: Any = torch.cat(tensors, axis) if isinstance(parts[0], Tensor) else View.cat(tensors, axis)
    return joined
