"""Weight gradients added to the fp32 ones by the matrix product that makes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_patch.model import groups

Accumulate = Callable[[Tensor, Tensor, Tensor], None]
"""Of inputs [t, in] and output gradients [t, out], whose product is added to a third, fp32 [out, in]."""


def accumulate_in_place(chunks: list[DistributedDataParallel]) -> None:
    """Have a wrapped model's linear layers do so, where this machine can. (Without a wrapper there is no `main_grad`.)

    Otherwise each micro batch's gradient is made in the weights' precision, read and added: 12 bytes for each 16-bit
    weight. Transformer Engine's layers have kernels of their own; megatron.core's take Apex's or torch's.
    """
    can = layers._grad_accum_fusion_available and is_exact(
        layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32, chunks[0].config.params_dtype, groups.device()
    )
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
            elif isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear):
                module.gradient_accumulation_fusion = can


def is_exact(accumulate: Accumulate, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `accumulate` takes activations of `dtype` there (torch's takes 16 bits on a GPU) and adds up in fp32."""
    value = 1 + 2**-7  # of 16 bits, its square not
    tokens = torch.full((16, 8), value, dtype=dtype, device=device)
    main_grad = torch.ones(8, 8, dtype=torch.float32, device=device)
    try:
        accumulate(tokens, tokens, main_grad)
    except (NotImplementedError, RuntimeError, TypeError):  # not for this device, or a torch without it
        return False
    return torch.equal(main_grad, torch.full_like(main_grad, 1 + 16 * value**2))
