"""What the toolkit does beside megatron.core's defaults, turned off one by one: what each brings.

A toggle looks for what it turns off on the live model, and raises `Absent` where this build has nothing of the kind.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from contestants import Ours
from megatron.core.models.common.embeddings import rope_utils

Toggle = Callable[[Ours], contextlib.AbstractContextManager]


class Absent(Exception):
    """There is nothing to turn off, or on."""


@contextlib.contextmanager
def attribute(objects: list[object], name: str, value: object) -> Iterator[None]:
    """Set an attribute of those that have it, and put it back. Raises `Absent` where that changes nothing."""
    found = [(item, getattr(item, name)) for item in objects if hasattr(item, name)]
    if not found:
        raise Absent(f"no {name} here")
    if all(before == value for _, before in found):
        raise Absent(f"{name} is {value} already")
    try:
        for item, _ in found:
            setattr(item, name, value)
        yield
    finally:
        for item, before in found:
            setattr(item, name, before)


def configs(ours: Ours) -> list[object]:
    """megatron.core's settings of the language model, each object once."""
    found = [module.config for module in ours.language_model.modules() if hasattr(module, "config")]
    return list({id(config): config for config in found}.values())


def setting(name: str, value: object) -> Toggle:
    """A field of the language model's settings that layers look up in each step."""
    return lambda ours: attribute(configs(ours), name, value)


@contextlib.contextmanager
def stock_rotary_embedding(ours: Ours) -> Iterator[None]:
    """megatron.core's own functions, from a second copy of their module, which no repair knows."""
    stock = stock_module(rope_utils)
    names = [name for name in vars(stock) if name.startswith("_apply_rotary") and is_replaced(rope_utils, name)]
    if not names:
        raise Absent("megatron.core's rotary embedding is its own")
    mended = {name: getattr(rope_utils, name) for name in names}
    try:
        for name in names:
            setattr(rope_utils, name, getattr(stock, name))
        yield
    finally:
        for name, function in mended.items():
            setattr(rope_utils, name, function)


def stock_module(module: ModuleType) -> ModuleType:
    """A second copy of a module, from its file."""
    spec = importlib.util.spec_from_file_location(f"stock_{module.__name__.rpartition('.')[2]}", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def is_replaced(module: ModuleType, name: str) -> bool:
    """Whether a function of the module comes from another file."""
    code = getattr(getattr(module, name, None), "__code__", None)
    return code is None or code.co_filename != module.__file__


@contextlib.contextmanager
def without_cudnn_attention(ours: Ours) -> Iterator[None]:
    """Attention by flash kernels where torch would take cuDNN's, which it plans for each length."""
    if not torch.cuda.is_available():
        raise Absent("needs a GPU")
    if not torch.backends.cuda.cudnn_sdp_enabled():
        raise Absent("cuDNN's attention is off already")
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@contextlib.contextmanager
def unfused_weight_gradients(ours: Ours) -> Iterator[None]:
    """Weights' gradients in the weights' type, then added to the fp32 ones."""
    with attribute(list(ours.language_model.modules()), "gradient_accumulation_fusion", False):
        yield


@contextlib.contextmanager
def foreach_adam(ours: Ours) -> Iterator[None]:
    """torch's AdamW as megatron.core builds it: several passes over all weights, and temporary copies."""
    groups = [group for optimizer in ours.torch_optimizers() for group in optimizer.param_groups]
    if not any(group.get("fused") for group in groups):
        raise Absent("torch's AdamW is not fused here")
    before = [(group, group["fused"], group.get("foreach")) for group in groups]
    try:
        for group in groups:
            group["fused"], group["foreach"] = False, True
        yield
    finally:
        for group, fused, foreach in before:
            group["fused"], group["foreach"] = fused, foreach


STAGE1: dict[str, Toggle] = {
    "megatron.core's SwiGLU": setting("bias_activation_fusion", False),
    "megatron.core's rotary embedding": stock_rotary_embedding,
    "no cuDNN attention": without_cudnn_attention,
}
STAGE2: dict[str, Toggle] = {
    "foreach AdamW": foreach_adam,
    "weight gradients in 16 bits": unfused_weight_gradients,
}
TRANSFORMER_ENGINE: dict[str, Toggle] = {
    "rotary embedding fused": setting("apply_rope_fusion", True),
    "rotary embedding not fused": setting("apply_rope_fusion", False),
    "SwiGLU fused": setting("bias_activation_fusion", True),
    "SwiGLU not fused": setting("bias_activation_fusion", False),
}
