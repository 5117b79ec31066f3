"""Transformer Engine fuses a norm with the linear layer after it, and so calls the norm by the layer's name.

The tables carry the local spec's names. The fused names are also the ones under which megatron.core saves both specs to
torch_dist (`sharded_state_dict_keys_map` in megatron/core/models/gpt/gpt_layer_specs.py).
"""

from __future__ import annotations

FUSED_NORMS = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".input_layernorm.bias", ".self_attention.linear_qkv.layer_norm_bias"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
    (".pre_mlp_layernorm.bias", ".mlp.linear_fc1.layer_norm_bias"),
)


def to_transformer_engine_name(name: str) -> str:
    """A parameter's name in the local spec -> in Transformer Engine's. Most are the same."""
    return _replace_end(name, FUSED_NORMS)


def to_local_name(name: str) -> str:
    """The inverse of `to_transformer_engine_name`; a local name is returned as it is."""
    return _replace_end(name, tuple((fused, local) for local, fused in FUSED_NORMS))


def _replace_end(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
