"""Checkpoints as the LLaVA repository (github.com/haotian-liu/LLaVA) saves them: one flat config.json, no tower in it.

The language model's settings and LLaVA's (`mm_...`) stand side by side, the projector lies among the language model's
weights, and the tower is a CLIP that is named.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_patch.families.clip import CLIP
from megatron_patch.families.sizes import VisionModel
from megatron_patch.families.table import short

LANGUAGE_MODELS = {"llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2", "llava": "llama"}
"""`model_type` of the checkpoint -> of its language model. The first LLaVAs say `llava`, as Hugging Face's do."""

ARCHITECTURES = {"LlavaMistralForCausalLM": "mistral", "LlavaQwenForCausalLM": "qwen2"}
CAUSAL = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
OWN = r"mm_.*|(un)?freeze_mm_.*|tune_mm_.*|use_mm_proj|image_.*|tokenizer_(padding_side|model_max_length)|auto_map|s2.*"

# What our network takes as given; an absent setting means the first value to LLaVA, None: it has no default.
REQUIRED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mm_projector_type": ("linear", ("mlp2x_gelu",)),
    "mm_vision_select_layer": (None, (-2,)),
    "mm_vision_select_feature": ("patch", ("patch",)),
    "mm_patch_merge_type": ("flat", ("flat",)),
    "image_aspect_ratio": ("square", ("square", "pad", None)),
    "s2": (False, (False,)),
}
TOWER = "model.vision_tower.vision_tower."
"""What precedes the tower's names, in checkpoints that hold it."""


def is_repository(hf_config: dict[str, Any]) -> bool:
    """Whether a config.json is one of the LLaVA repository's."""
    kind = hf_config.get("model_type")
    if kind != "llava":
        return isinstance(kind, str) and kind.startswith("llava_") and "text_config" not in hf_config
    return "text_config" not in hf_config and any(name.startswith("mm_") for name in hf_config)


def text_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The language model's config.json in it. Raises ValueError for a language model without a table."""
    kind = hf_config["model_type"]
    named = hf_config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    family = ARCHITECTURES.get(architecture) if kind == "llava" and architecture is not None else None
    family = family or LANGUAGE_MODELS.get(kind)
    if family is None:
        known = ", ".join(LANGUAGE_MODELS)
        raise ValueError(f"model_type is {short(kind)}, of the LLaVA repository's only {known} are supported")
    own = {name: value for name, value in hf_config.items() if not re.fullmatch(OWN, name)}
    return {**own, "model_type": family, "architectures": [CAUSAL[family]]}


def check_settings(hf_config: dict[str, Any]) -> None:
    """Raise ValueError, which names the setting, for a LLaVA that is put together otherwise than ours."""
    for name, (default, allowed) in REQUIRED.items():
        given = hf_config.get(name, default)
        if given not in allowed:
            raise ValueError(f"{name} is {short(given)}; of the LLaVA repository's only {allowed[0]!r} is supported")
    if hf_config.get("mm_use_im_start_end"):
        raise ValueError(
            "mm_use_im_start_end is true; set it to false here to import the weights, and train with "
            "--use-im-start-end true"
        )


def check_tower(hf_config: dict[str, Any], tower: VisionModel, folder: Path) -> None:
    """Raise ValueError where the tower in `folder` is not one that the checkpoint's `mm_vision_tower` can be."""
    if tower.family is not CLIP:
        raise ValueError(
            f"{folder}: is a {tower.family.name}, and the LLaVA repository's towers are CLIP's; give the folder of "
            f"{tower_name(hf_config)!r}"
        )
    name, width = tower_name(hf_config), hf_config.get("mm_hidden_size", tower.hidden_size)
    said = re.search(r"clip-vit-\w+-patch(\d+)(?:-(\d+))?$", name)
    expected = (int(said[1]), int(said[2] or 224)) if said else (tower.patch_dim, tower.img_size)
    if width != tower.hidden_size or expected != (tower.patch_dim, tower.img_size):
        raise ValueError(
            f"{folder}: is a CLIP of width {tower.hidden_size} for {tower.img_size} pixels in patches of "
            f"{tower.patch_dim}; this LLaVA was trained on {name!r} of width {short(width)}, give that one's folder"
        )


def tower_name(hf_config: dict[str, Any]) -> str:
    """What the checkpoint calls its tower, for messages."""
    return str(hf_config.get("mm_vision_tower") or hf_config.get("vision_tower") or "a CLIP that it does not name")[
        :200
    ]


def pads(hf_config: dict[str, Any]) -> bool:
    """Whether LLaVA makes an image square before CLIP's transform."""
    return hf_config.get("image_aspect_ratio") == "pad"
