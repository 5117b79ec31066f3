"""The norm of all weights, as Megatron-LM's calc_params_l2_norm counts it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import MegatronModule, param_is_not_shared
from torch import Tensor
from torch.nn import Parameter

from megatron_patch.model import groups


def params_norm(chunks: list[MegatronModule]) -> float:
    """L2 norm of the whole model's weights, frozen ones included. All ranks call it; all get the same.

    Weights that several tensor-parallel ranks or pipeline stages hold alike count once. Frozen ones are read the first
    time, and again when they have changed.
    """
    squares = torch.zeros((), dtype=torch.float64, device=groups.device())
    for chunk in chunks:
        mine = [
            parameter
            for parameter in chunk.parameters()
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
        ]
        squares += _squares([parameter for parameter in mine if parameter.requires_grad])
        squares += _frozen_squares(chunk, [parameter for parameter in mine if not parameter.requires_grad])
    dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    return squares.sqrt().item()


def _frozen_squares(chunk: MegatronModule, frozen: list[Parameter]) -> Tensor:
    """`_squares` of the frozen weights, kept on `chunk`: most of a model, and the same at each step."""
    state = [(parameter.data_ptr(), parameter._version) for parameter in frozen]  # writing counts the version up
    known: tuple[Any, Tensor] | None = getattr(chunk, "frozen_squares", None)
    if known is None or known[0] != state:
        known = chunk.frozen_squares = state, _squares(frozen)
    return known[1]


def _squares(weights: list[Parameter]) -> Tensor:
    """Sum of their squares, fp64."""
    if not weights:
        return torch.zeros((), dtype=torch.float64, device=groups.device())
    norms = torch._foreach_norm([weight.detach() for weight in weights], 2, dtype=torch.float32)
    return torch.stack(norms).double().square().sum()
