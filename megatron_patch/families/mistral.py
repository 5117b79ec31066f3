"""Mistral: Llama's tensors, other defaults, and a sliding window."""

from __future__ import annotations

from megatron_patch.families.llama import REQUIRED, SETTINGS, WEIGHTS
from megatron_patch.families.table import LanguageFamily, Setting

MISTRAL = LanguageFamily(
    name="mistral",
    weights=WEIGHTS,
    activation="silu",
    norm="RMSNorm",
    prompt_format="mistral",
    settings=(
        *SETTINGS,
        Setting("vocab_size", "vocab_size", 32000),
        Setting("ffn_hidden_size", "intermediate_size", 14336),
        Setting("num_query_groups", "num_key_value_heads", 8, optional=True),
        Setting("kv_channels", "head_dim", None),
        Setting("max_position_embeddings", "max_position_embeddings", 131072),
        # An absent key means 4096 to MistralConfig; a model without a window says null.
        Setting("sliding_window", "sliding_window", 4096, optional=True),
    ),
    required=REQUIRED,
)
