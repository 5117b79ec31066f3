"""Weight gradients added up in place, their norm and clipping without a wait for each: without Apex's kernels.

Line numbers are the wheel's, in megatron/core.
"""

from __future__ import annotations

import functools
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from megatron_patch.patches import Repair


def fused_accumulation(module: ModuleType) -> None:
    """tensor_parallel/layers.py:44 finds no way to add up gradients but Apex's; torch's matrix product has one too.

    Otherwise each micro batch makes a weight's gradient in 16 bits, reads it and adds it to the fp32 one.
    """
    if module._grad_accum_fusion_available:
        return
    module.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
    module._grad_accum_fusion_available = True


def add_product(inputs: Tensor, gradients: Tensor, main_grad: Tensor) -> None:
    """Add to fp32 `main_grad` [out, in] the product of `gradients` [t, out] and `inputs` [t, in], added up in fp32."""
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(gradients.t(), inputs)
    else:
        torch.addmm(main_grad, gradients.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)


def norm_at_once(module: ModuleType) -> None:
    """utils.py:1205 waits for the device once for each weight, to put its norm into a list."""

    @functools.wraps(module.local_multi_tensor_l2_norm)
    def l2_norm(chunk_size, noop_flag, tensor_lists: list[list[Tensor]], per_tensor, *args) -> tuple[Tensor, None]:
        norms = [norm for tensors in tensor_lists for norm in torch._foreach_norm(tensors, 2, dtype=torch.float32)]
        return torch.linalg.vector_norm(torch.stack(norms)).view(1), None

    module.local_multi_tensor_l2_norm = l2_norm


def scaling_in_place(module: ModuleType) -> None:
    """utils.py:1215 scales each gradient into another tensor and copies it back."""
    stock = module.local_multi_tensor_scale

    @functools.wraps(stock)
    def scale_all(chunk_size, noop_flag, tensor_lists: list[list[Tensor]], scale: float) -> None:
        source, target = tensor_lists
        if source is not target:
            stock(chunk_size, noop_flag, tensor_lists, scale)
        elif target:
            torch._foreach_mul_(target, scale)

    module.local_multi_tensor_scale = scale_all


REPAIRS = (
    Repair("megatron.core.tensor_parallel.layers", fused_accumulation),
    Repair("megatron.core.utils", norm_at_once, "local_multi_tensor_l2_norm", "01526c55444a"),
    Repair("megatron.core.utils", scaling_in_place, "local_multi_tensor_scale", "a271d86b6125"),
)
