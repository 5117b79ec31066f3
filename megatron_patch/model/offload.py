"""Activations kept in the CPU's memory between forward and backward.

megatron.core's own (cpu_offloading) is Transformer Engine's. This is torch's hook for saved tensors, which works with
any layer: what autograd keeps for the backward pass is copied to pinned memory, and back when it is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**16
"""Elements below which a tensor stays where it is: a copy would cost more than it frees."""


class ActivationOffload(saved_tensors_hooks):
    """A context in which everything that autograd saves goes to the CPU, except small tensors and `module`'s weights.

    Copies are queued on the stream that computes, so that nothing waits for them on the CPU. Without a GPU it makes the
    same copies and frees nothing.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        # By storage, since what is saved is often a view of a weight. Anew each time: wrapping a model for data
        # parallelism moves its weights.
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

        def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if tensor.numel() < SMALLEST or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            return tensor.device, kept.copy_(tensor, non_blocking=True)

        super().__init__(pack, unpack)


def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    """What was saved, where it was."""
    if isinstance(packed, Tensor):
        return packed
    device, kept = packed
    return kept.to(device, non_blocking=True)
