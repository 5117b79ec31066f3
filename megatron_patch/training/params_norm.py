"""The norm of all weights, as Megatron-LM's calc_params_l2_norm counts it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import MegatronModule, param_is_not_shared

from megatron_patch import parallel


def params_norm(chunks: list[MegatronModule]) -> float:
    """L2 norm of the whole model's weights, frozen ones included. All ranks call it; all get the same.

    Weights that several tensor-parallel ranks or pipeline stages hold alike count once.
    """
    mine = [
        parameter.detach()
        for chunk in chunks
        for parameter in chunk.parameters()
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
    ]
    squares = torch.zeros((), dtype=torch.float64, device=parallel.device())
    if mine:
        norms = torch._foreach_norm(mine, 2, dtype=torch.float32)
        squares += torch.stack(norms).double().square().sum()
    dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    return squares.sqrt().item()
