"""CLIP's vision tower (Radford et al. 2021), as LLaVA uses it: the second last layer's output, no post-norm."""

from __future__ import annotations

from megatron_patch.families.table import Family, Setting, Weight, column, qkv, replicated, row

HF = "vision_model.encoder.layers.*."
MCORE = "decoder.layers.*."

CLIP = Family(
    name="clip_vision_model",
    weights=(
        Weight("class_token", ("vision_model.embeddings.class_embedding",), layout="class_token"),
        replicated("conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        replicated("position_embeddings.weight", "vision_model.embeddings.position_embedding.weight"),
        replicated("ln_pre.weight", "vision_model.pre_layrnorm.weight"),
        replicated("ln_pre.bias", "vision_model.pre_layrnorm.bias"),
        replicated(MCORE + "input_layernorm.weight", HF + "layer_norm1.weight"),
        replicated(MCORE + "input_layernorm.bias", HF + "layer_norm1.bias"),
        qkv(MCORE + "self_attention.linear_qkv.weight", HF + "self_attn"),
        qkv(MCORE + "self_attention.linear_qkv.bias", HF + "self_attn", "bias"),
        row(MCORE + "self_attention.linear_proj.weight", HF + "self_attn.out_proj.weight"),
        replicated(MCORE + "self_attention.linear_proj.bias", HF + "self_attn.out_proj.bias"),
        replicated(MCORE + "pre_mlp_layernorm.weight", HF + "layer_norm2.weight"),
        replicated(MCORE + "pre_mlp_layernorm.bias", HF + "layer_norm2.bias"),
        column(MCORE + "mlp.linear_fc1.weight", HF + "mlp.fc1.weight"),
        column(MCORE + "mlp.linear_fc1.bias", HF + "mlp.fc1.bias"),
        row(MCORE + "mlp.linear_fc2.weight", HF + "mlp.fc2.weight"),
        replicated(MCORE + "mlp.linear_fc2.bias", HF + "mlp.fc2.bias"),
    ),
    settings=(
        Setting("hidden_size", "hidden_size", 768),
        Setting("ffn_hidden_size", "intermediate_size", 3072),
        Setting("num_attention_heads", "num_attention_heads", 12),
        Setting("layernorm_epsilon", "layer_norm_eps", 1e-5),
        Setting("patch_dim", "patch_size", 32),
        Setting("img_size", "image_size", 224),
    ),
    required=(("hidden_act", ("quick_gelu",)), ("num_channels", (3,))),
    unused_layers=1,
    unused=("vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"),
    # A whole CLIPModel brings its text half; position_ids is a constant that older versions wrote.
    ignored=(
        r"text_model\..*",
        r"logit_scale",
        r"(text|visual)_projection\.weight",
        r"vision_model\.embeddings\.position_ids",
    ),
    # transformers 5 leaves out `vision_model.` when it saves a CLIPVisionModel.
    renamed=((r"^(?=(embeddings|pre_layrnorm|encoder|post_layernorm)\.)", "vision_model."),),
)
