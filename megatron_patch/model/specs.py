"""Which of megatron.core's classes a layer is built of: its local ones, or Transformer Engine's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_patch.config.train import Model
from megatron_patch.model.attention import SDPAttention
from megatron_patch.patches.transformer_engine import transformer_engine_fault

# torch_dist checkpoints carry Transformer Engine's names whichever spec wrote them, as gpt_layer_specs.py does it.
# (megatron.core's own vision specs lack this, so that their checkpoints fit one spec only.)
SPEC_NEUTRAL_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}

FP8_MULTIPLE = 16
"""Tokens that fp8's matrix products take at a time (Transformer Engine asks for it in the weights' gradients)."""


class TorchNorm:
    """torch's norm, also under sequence parallelism, which megatron.core's WrappedTorchNorm refuses (torch_norm.py:34).

    All that it takes is a mark on the weights, whose gradients are then added up over the tensor-parallel ranks.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
        for setting in ("layernorm_zero_centered_gamma", "persist_layer_norm", "memory_efficient_layer_norm"):
            if getattr(config, setting):
                raise ValueError(
                    f"{setting}: torch's norm has no such thing; use --transformer-impl transformer_engine"
                )
        kind = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization]
        module = kind(hidden_size, eps=eps)
        weights: list[Any] = list(module.parameters())
        for parameter in weights:
            parameter.sequence_parallel = config.sequence_parallel
        return module


def uses_transformer_engine(model: Model) -> bool:
    """Whether layers are Transformer Engine's. Raises ValueError when it was asked for and cannot be had."""
    fault = transformer_engine_fault() if torch.cuda.is_available() else "no GPU is visible"
    if fault and model.transformer_impl == "transformer_engine":
        raise ValueError(f"--transformer-impl transformer_engine: {fault}; use local")
    if fault and model.precision == "fp8":
        raise ValueError(f"--precision fp8: needs Transformer Engine, and {fault}; use bf16")
    return fault is None and model.transformer_impl != "local"


def norm(model: Model) -> type:
    """The class of a norm that stands alone."""
    if uses_transformer_engine(model):
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return TorchNorm


def block_spec(
    config: TransformerConfig, model: Model, mask_type: AttnMaskType, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers that this pipeline stage (or this virtual one of its stages) builds, and the norm after them.

    `mask_type`: causal for the language model. The vision tower's is no_mask (megatron.core's own local vision spec
    says causal, which is silently wrong).
    """
    make_layer = _transformer_engine_layer if uses_transformer_engine(model) else _local_layer
    layer = make_layer(model, mask_type)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=norm(model)
    )


def projector_submodules(model: Model) -> MLPSubmodules:
    """The two linear layers of the projector."""
    if uses_transformer_engine(model):
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _local_layer(model: Model, mask_type: AttnMaskType) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SDPAttention if model.use_flash_attn else DotProductAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TorchNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=SPEC_NEUTRAL_NAMES,
        ),
    )


def padded(linear: type) -> type:
    """The class of a linear layer that pads its tokens [s, b, h] to what fp8's kernels ask for.

    An image is 577 of them, and the text is padded before the model. The rows that are added come to nothing: their
    outputs are cut off, so that their gradients are zero.
    """

    class Padded(linear):
        def forward(self, tokens: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
            length = tokens.shape[0]
            output, bias = super().forward(F.pad(tokens, (0, 0, 0, 0, 0, -length % FP8_MULTIPLE)), *args, **kwargs)
            return output[:length], bias

    return Padded


def _transformer_engine_layer(model: Model, mask_type: AttnMaskType) -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    column, row = TELayerNormColumnParallelLinear, TERowParallelLinear
    if model.precision == "fp8" and mask_type == AttnMaskType.no_mask:  # the vision tower
        column, row = padded(column), padded(row)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=TEDotProductAttention,
                    linear_proj=row,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
