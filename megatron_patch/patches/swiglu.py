"""SwiGLU in few kernels where megatron.core's is not compiled: on a CPU, and on a GPU without a compiler."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_patch.patches import Repair


def few_kernels(module: ModuleType) -> None:
    """fused_bias_swiglu.py:66 is a formula for a compiler: operation by operation its backward pass is 11 kernels.

    That is two to three times as long as autograd's own on a CPU. The same in four, equal to autograd's to the bit.
    """
    if module.jit_fuser is torch.compile:
        return
    stock = module.SwiGLUFunction

    class SwiGLUFunction(stock):
        @staticmethod
        def forward(ctx, input: Tensor, fp8_input_store: bool, cpu_offload_input: bool) -> Tensor:
            if fp8_input_store or cpu_offload_input:
                raise NotImplementedError("SwiGLU: its input is kept as it is; use a compiler for fp8_input_store")
            ctx.save_for_backward(input)
            gate, up = input.chunk(2, dim=-1)
            return F.silu(gate).mul_(up)

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
            (input,) = ctx.saved_tensors
            gate, up = input.chunk(2, dim=-1)
            result = torch.empty_like(input)
            of_gate, of_up = result.chunk(2, dim=-1)
            silu = F.silu(gate)
            torch.mul(gradient, silu, out=of_up)
            torch.ops.aten.silu_backward.grad_input(torch.mul(gradient, up, out=silu), gate, grad_input=of_gate)
            return result, None, None

    module.SwiGLUFunction = SwiGLUFunction


REPAIRS = (Repair("megatron.core.fusions.fused_bias_swiglu", few_kernels, "SwiGLUFunction", "826ff43649e5"),)
