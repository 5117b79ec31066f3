"""SigLIP's vision tower (Zhai et al. 2023, arXiv:2303.15343): CLIP's layers; no class token and no norm before them."""

from __future__ import annotations

from megatron_patch.families.clip import EMBEDDINGS, LAYERS, SETTINGS
from megatron_patch.families.table import Setting, VisionFamily, replicated

HEAD = "vision_model.head."

SIGLIP = VisionFamily(
    name="siglip_vision_model",
    weights=(replicated("conv1.bias", "vision_model.embeddings.patch_embedding.bias"), *EMBEDDINGS, *LAYERS),
    activation="gelu_tanh",
    norm="LayerNorm",
    hf_class="SiglipVisionModel",
    whole_model="siglip",
    feature_layer=-2,
    select_strategy="full",
    image_processor="SiglipImageProcessor",
    image_settings={
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    settings=(
        *SETTINGS,
        Setting("layernorm_epsilon", "layer_norm_eps", 1e-6),
        Setting("patch_dim", "patch_size", 16),
    ),
    required=(("hidden_act", ("gelu_pytorch_tanh",)), ("num_channels", (3,))),
    unused=(("vision_model.post_layernorm.weight", ("hidden",)), ("vision_model.post_layernorm.bias", ("hidden",))),
    # Attention that pools all positions into one, which vision_use_head false leaves out.
    optional=(
        (HEAD + "probe", ("one", "one", "hidden")),
        (HEAD + "attention.in_proj_weight", ("qkv", "hidden")),
        (HEAD + "attention.in_proj_bias", ("qkv",)),
        (HEAD + "attention.out_proj.weight", ("hidden", "hidden")),
        (HEAD + "attention.out_proj.bias", ("hidden",)),
        (HEAD + "layernorm.weight", ("hidden",)),
        (HEAD + "layernorm.bias", ("hidden",)),
        (HEAD + "mlp.fc1.weight", ("ffn", "hidden")),
        (HEAD + "mlp.fc1.bias", ("ffn",)),
        (HEAD + "mlp.fc2.weight", ("hidden", "ffn")),
        (HEAD + "mlp.fc2.bias", ("hidden",)),
    ),
    # A whole SiglipModel brings its text half.
    ignored=(r"text_model\..*", r"logit_(scale|bias)", r"vision_model\.embeddings\.position_ids"),
    renamed=((r"^(?=(embeddings|encoder|post_layernorm|head)\.)", "vision_model."),),
)
