"""Llama 2 and 3 (and Vicuna): RMSNorm, rotary embedding, grouped queries, gated SiLU. Mistral has the same tensors."""

from __future__ import annotations

from megatron_patch.families.table import LanguageFamily, Setting, gated, qkv, replicated, row, vocab

HF = "model.layers.*."
MCORE = "decoder.layers.*."

WEIGHTS = (
    vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    replicated(MCORE + "input_layernorm.weight", HF + "input_layernorm.weight"),
    qkv(MCORE + "self_attention.linear_qkv.weight", HF + "self_attn"),
    row(MCORE + "self_attention.linear_proj.weight", HF + "self_attn.o_proj.weight"),
    replicated(MCORE + "pre_mlp_layernorm.weight", HF + "post_attention_layernorm.weight"),
    gated(MCORE + "mlp.linear_fc1.weight", HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"),
    row(MCORE + "mlp.linear_fc2.weight", HF + "mlp.down_proj.weight"),
    replicated("decoder.final_layernorm.weight", "model.norm.weight"),
    vocab("output_layer.weight", "lm_head.weight"),
)

SETTINGS = (
    Setting("num_layers", "num_hidden_layers", 32),
    Setting("hidden_size", "hidden_size", 4096),
    Setting("num_attention_heads", "num_attention_heads", 32),
    Setting("layernorm_epsilon", "rms_norm_eps", 1e-6),
    Setting("share_embeddings_and_output_weights", "tie_word_embeddings", False),
)

REQUIRED = (
    ("hidden_act", ("silu",)),
    ("attention_bias", (False,)),
    ("mlp_bias", (False,)),
    ("pretraining_tp", (1,)),
)

LLAMA = LanguageFamily(
    name="llama",
    weights=WEIGHTS,
    activation="silu",
    norm="RMSNorm",
    prompt_format="llama_2",
    settings=(
        *SETTINGS,
        Setting("vocab_size", "vocab_size", 32000),
        Setting("ffn_hidden_size", "intermediate_size", 11008),
        Setting("num_query_groups", "num_key_value_heads", None),
        Setting("kv_channels", "head_dim", None),
        Setting("max_position_embeddings", "max_position_embeddings", 2048),
    ),
    required=REQUIRED,
    # Written by transformers before 4.33: a constant, not a weight.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
