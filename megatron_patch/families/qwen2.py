"""Qwen2 and Qwen2.5: Llama's tensors, and a bias on query, key and value."""

from __future__ import annotations

from megatron_patch.families.llama import HF, MCORE, SETTINGS, WEIGHTS
from megatron_patch.families.table import LanguageFamily, Setting, qkv

QWEN2 = LanguageFamily(
    name="qwen2",
    weights=(*WEIGHTS, qkv(MCORE + "self_attention.linear_qkv.bias", HF + "self_attn", "bias")),
    activation="silu",
    norm="RMSNorm",
    prompt_format="chatml",
    settings=(
        *SETTINGS,
        Setting("vocab_size", "vocab_size", 151936),
        Setting("ffn_hidden_size", "intermediate_size", 22016),
        Setting("num_query_groups", "num_key_value_heads", 32, optional=True),
        Setting("kv_channels", "head_dim", None),
        Setting("max_position_embeddings", "max_position_embeddings", 32768),
    ),
    # `sliding_window` holds a number in every config.json; this is what switches it on.
    required=(("hidden_act", ("silu",)), ("use_sliding_window", (False,))),
)
