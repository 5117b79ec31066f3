"""Activations kept in the CPU's memory between forward and backward.

megatron.core's own (cpu_offloading) is Transformer Engine's. This is torch's hook for saved tensors, which works with
any layer: what autograd keeps for the backward pass is copied to pinned memory, and back before it is asked for.
"""

from __future__ import annotations

import functools
from collections import deque
from weakref import WeakValueDictionary

import torch
from torch import Tensor, cuda
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**16
"""Elements below which a tensor stays where it is: a copy would cost more than it frees."""

IN_FLIGHT = 8
"""Tensors that are on their way at a time, in each direction: about a layer's. So many take memory on the GPU too."""


class ActivationOffload(saved_tensors_hooks):
    """A context in which everything that autograd saves goes to the CPU, except small tensors and `module`'s weights.

    On a GPU, copies run beside the computation, on a stream for each direction. Without one it makes the same copies
    and frees nothing.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        # By storage, since what is saved is often a view of a weight. Again each time: wrapping a model for data
        # parallelism moves its weights.
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        in_order = Offload()

        def pack(tensor: Tensor) -> Tensor | Saved:
            if tensor.numel() < SMALLEST or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            return in_order.save(tensor)

        super().__init__(pack, lambda packed: packed if isinstance(packed, Tensor) else in_order.load(packed))


class Saved:
    """A tensor that was saved, in the CPU's memory and, while it is on its way, on the GPU."""

    def __init__(self, number: int, tensor: Tensor) -> None:
        self.number = number
        self.device = tensor.device
        self.kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self.leaving: Tensor | None = None
        self.arriving: Tensor | None = None
        self.left: torch.Event | cuda.Event | None = None
        self.arrived: torch.Event | cuda.Event | None = None
        self.was_loaded = False

    def __del__(self) -> None:
        if (
            self.arriving is not None and self.arrived is not None
        ):  # fetched and never asked for: what takes its memory next waits for the copy
            cuda.current_stream(self.device).wait_event(self.arrived)


class Offload:
    """What one forward pass saves, in order: the backward pass asks for it in the opposite one.

    Memory on the GPU is allocated and freed on the stream that computes, which waits for a copy before it lets go of
    what is copied. (With `record_stream` memory is free when the GPU has come to where the CPU is already: too late.)
    """

    def __init__(self) -> None:
        self.saved: WeakValueDictionary[int, Saved] = WeakValueDictionary()  # autograd holds them
        self.leaving: deque[Saved] = deque()
        self.count = 0

    def save(self, tensor: Tensor) -> Saved:
        """Begin to copy `tensor` to the CPU."""
        saved = self.saved[self.count] = Saved(self.count, tensor)
        self.count += 1
        if not uses_streams(tensor.device):
            saved.kept.copy_(tensor)
            return saved
        compute, (out, _) = cuda.current_stream(tensor.device), streams(tensor.device)
        saved.leaving = tensor.detach()  # its memory, whatever the pipeline does to the tensor after sending it
        out.wait_stream(compute)
        with cuda.stream(out):
            saved.kept.copy_(saved.leaving, non_blocking=True)
        saved.left = out.record_event()
        self.leaving.append(saved)
        if len(self.leaving) > IN_FLIGHT:
            gone = self.leaving.popleft()
            assert gone.left is not None
            compute.wait_event(gone.left)
            gone.leaving = None
        return saved

    def load(self, saved: Saved) -> Tensor:
        """What was saved, where it was; and begin to copy back what will be asked for next."""
        if not uses_streams(saved.device):
            return saved.kept.to(saved.device)
        self._fetch(saved)
        for number in range(saved.number - 1, saved.number - IN_FLIGHT, -1):
            earlier = self.saved.get(number)
            if earlier is not None and not earlier.was_loaded:
                self._fetch(earlier)
        if saved.leaving is not None:
            return saved.leaving
        assert saved.arriving is not None, "it was fetched"
        assert saved.arrived is not None, "it was fetched"
        cuda.current_stream(saved.device).wait_event(saved.arrived)
        tensor, saved.arriving, saved.was_loaded = saved.arriving, None, True
        return tensor

    def _fetch(self, saved: Saved) -> None:
        """Begin to copy it back, where it is not on the GPU."""
        if saved.leaving is not None or saved.arriving is not None:
            return
        saved.arriving = torch.empty_like(saved.kept, device=saved.device)
        _, back = streams(saved.device)
        back.wait_stream(cuda.current_stream(saved.device))  # which may still read what the memory held before
        assert saved.left is not None, "it was saved"
        back.wait_event(saved.left)
        with cuda.stream(back):
            saved.arriving.copy_(saved.kept, non_blocking=True)
        saved.arrived = back.record_event()


def uses_streams(device: torch.device) -> bool:
    """Whether copies from and to this device can run beside the computation."""
    return device.type == "cuda"


@functools.cache
def streams(device: torch.device) -> tuple[cuda.Stream, cuda.Stream]:
    """The streams of copies from the device and back to it."""
    return cuda.Stream(device), cuda.Stream(device)
