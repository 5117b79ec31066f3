"""The rotary embedding in few kernels, where Transformer Engine's is not used.

Line numbers are the wheel's, in megatron/core/models/common/embeddings/rope_utils.py.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_patch.patches import Repair


def one_rotation(module: ModuleType) -> None:
    """:87 rotates with nine kernels, of which four take cosine and sine again for each layer's queries and keys.

    They are taken once, and the rotation is three kernels forward and backward. Autograd keeps nothing of its own for
    it. Equal to rounding: in 16 bits there is one less. What else :87 can do (interleaved, multi-latent) stays there.
    """
    stock = module._apply_rotary_pos_emb_bshd
    tables = Recent()

    @functools.wraps(stock)
    def rotate(
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> Tensor:
        """`t` [s, ..., n, d] and angles `freqs` [s, 1, 1, r] -> [s, ..., n, d], of which the first r are rotated."""
        if rotary_interleaved or multi_latent_attention or freqs.requires_grad:
            return stock(t, freqs, rotary_interleaved, multi_latent_attention, mscale)

        def take() -> tuple[Tensor, Tensor]:
            return (torch.cos(freqs) * mscale).to(t.dtype), (torch.sin(freqs) * mscale).to(t.dtype)

        return _Rotation.apply(t, *tables.get((freqs,), (t.dtype, mscale), take))

    module._apply_rotary_pos_emb_bshd = rotate


def angles_of_packed_samples(module: ModuleType) -> None:
    """:158 puts the angles of a packed sequence's samples together again for each layer's queries and keys."""
    stock = module._apply_rotary_pos_emb_thd
    packed = Recent()

    @functools.wraps(stock)
    def rotate(
        t: Tensor,
        cu_seqlens: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
        cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> Tensor:
        """`t` [t, n, d] of samples that begin and end at `cu_seqlens` (before they are sharded) -> [t, n, d]."""
        if cp_group is None:
            raise ValueError("cp_group must be provided for THD format RoPE")
        rank, size = cp_group.rank(), cp_group.size()

        def pack() -> Tensor:
            borders = cu_seqlens.tolist()
            lengths = [(end - start) // size for start, end in itertools.pairwise(borders)]
            # One angle for each position of all samples, or those of the longest sample for each of them.
            starts = borders[:-1] if freqs.size(0) == borders[-1] else [0] * len(lengths)
            slices = [
                module._get_thd_freqs_on_this_cp_rank(rank, size, sample, freqs, start)
                for sample, start in zip(t.split(lengths), starts, strict=True)
            ]
            return torch.cat(slices)

        angles = packed.get((cu_seqlens, freqs), (rank, size), pack)
        return module._apply_rotary_pos_emb_bshd(
            t.unsqueeze(1), angles, rotary_interleaved, multi_latent_attention, mscale
        ).squeeze(1)

    module._apply_rotary_pos_emb_thd = rotate


class Recent:
    """The latest results by the tensors that they are made of: those of the micro batches in flight.

    Tensors are the same when their memory is, since recomputation hands over others that share it. They are held, so
    that nothing else can come to lie there.
    """

    SIZE = 4

    def __init__(self) -> None:
        self.results: dict[tuple, tuple[tuple[Tensor, ...], Any]] = {}

    def get(self, tensors: tuple[Tensor, ...], others: tuple, make: Callable[[], Any]) -> Any:
        """The result for these tensors and other arguments; `make` says it the first time."""
        if any(type(tensor) is not Tensor or tensor.is_inference() for tensor in tensors):
            return make()  # no memory (FakeTensor), or no count of its changes
        key = (*((each.data_ptr(), each._version, each.shape, each.stride()) for each in tensors), *others)
        if key not in self.results:
            while len(self.results) >= self.SIZE:
                del self.results[next(iter(self.results))]
            with torch.no_grad():
                self.results[key] = tensors, make()
        return self.results[key][1]


class _Rotation(torch.autograd.Function):
    """`t` [s, b, n, d], `cos` and `sin` [s, 1, 1, r] in its precision -> [s, b, n, d]."""

    @staticmethod
    def forward(ctx, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Not by save_for_backward: they are all layers' own, so there is nothing to offload or to count.
        ctx.tables = cos, sin
        first, second = sin.chunk(2, dim=-1)
        return _rotate(t, cos, first, second, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.tables
        first, second = sin.chunk(2, dim=-1)
        return _rotate(gradient, cos, second, first, 1), None, None


def _rotate(t: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
    """(a, b) -> (a * cos + sign * b * `first`, b * cos - sign * a * `second`), of `t`'s first channels."""
    width = cos.shape[-1]
    result = t.new_empty(t.shape)
    rotated, given = (result, t) if width == t.shape[-1] else (result[..., :width], t[..., :width])
    if given is not t:
        result[..., width:] = t[..., width:]
    torch.mul(given, cos, out=rotated)
    (a, b), (new_a, new_b) = given.chunk(2, dim=-1), rotated.chunk(2, dim=-1)
    new_a.addcmul_(b, first, value=sign)
    new_b.addcmul_(a, second, value=-sign)
    return result


REPAIRS = (
    Repair(
        "megatron.core.models.common.embeddings.rope_utils",
        one_rotation,
        "_apply_rotary_pos_emb_bshd",
        "2d6f53f0fe6f",
    ),
    Repair(
        "megatron.core.models.common.embeddings.rope_utils",
        angles_of_packed_samples,
        "_apply_rotary_pos_emb_thd",
        "45c1da33b8ab",
    ),
)
