"""What megatron.core 0.16.1 needs to build a network without memory, under `torch.device("meta")`, on every machine.

Line numbers are the wheel's, under megatron/core/.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_patch.patches import Repair


def positions_without_memory(module: ModuleType) -> None:
    """models/vision/clip_vit_model.py:124 moves the tower's position ids to the GPU with `.cuda()`.

    Under the meta device they have no content that could be moved: NotImplementedError, on every machine with a GPU. So
    they stay, and whoever fills in the weights sets `position_ids` too. (`use_cpu_initialization`, by which the rest of
    megatron.core leaves the device alone, is not asked there.) Needless when it is, or when they are a buffer.
    """
    stock = module.CLIPViTModel.__init__

    @functools.wraps(stock)
    def init(self, *args, **kwargs):
        if torch.get_default_device().type != "meta":
            return stock(self, *args, **kwargs)
        with _MetaStays():
            return stock(self, *args, **kwargs)

    module.CLIPViTModel.__init__ = init


class _MetaStays(TorchFunctionMode):
    """`.cuda()` leaves a tensor on the meta device where it is: in this context and this thread alone."""

    def __torch_function__(self, function, types, args: Any = (), kwargs=None):
        if function is torch.Tensor.cuda and args[0].is_meta:
            return args[0]
        return function(*args, **(kwargs or {}))


REPAIRS = (
    Repair(
        "megatron.core.models.vision.clip_vit_model", positions_without_memory, "CLIPViTModel.__init__", "a20524c8fc39"
    ),
)
