"""CLIP's vision tower (Radford et al. 2021), as LLaVA uses it: a layer's output, no post-norm."""

from __future__ import annotations

from megatron_patch.families.table import Setting, VisionFamily, Weight, column, qkv, replicated, row

HF = "vision_model.encoder.layers.*."
MCORE = "decoder.layers.*."

# What other towers have too.
EMBEDDINGS = (
    replicated("conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    replicated("position_embeddings.weight", "vision_model.embeddings.position_embedding.weight"),
)
LAYERS = (
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
)
SETTINGS = (
    Setting("hidden_size", "hidden_size", 768),
    Setting("ffn_hidden_size", "intermediate_size", 3072),
    Setting("num_attention_heads", "num_attention_heads", 12),
    Setting("img_size", "image_size", 224),
    Setting("num_layers", "num_hidden_layers", 12),
)

CLIP = VisionFamily(
    name="clip_vision_model",
    weights=(
        Weight("class_token", ("vision_model.embeddings.class_embedding",), layout="class_token"),
        *EMBEDDINGS,
        replicated("ln_pre.weight", "vision_model.pre_layrnorm.weight"),
        replicated("ln_pre.bias", "vision_model.pre_layrnorm.bias"),
        *LAYERS,
    ),
    activation="quick_gelu",
    norm="LayerNorm",
    hf_class="CLIPVisionModel",
    whole_model="clip",
    feature_layer=-2,
    select_strategy="default",
    image_processor="CLIPImageProcessor",
    image_settings={
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    settings=(
        *SETTINGS,
        Setting("layernorm_epsilon", "layer_norm_eps", 1e-5),
        Setting("patch_dim", "patch_size", 32),
    ),
    required=(("hidden_act", ("quick_gelu",)), ("num_channels", (3,))),
    unused=(("vision_model.post_layernorm.weight", ("hidden",)), ("vision_model.post_layernorm.bias", ("hidden",))),
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
