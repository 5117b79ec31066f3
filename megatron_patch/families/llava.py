"""LLaVA: a language model, a vision tower and a projector, each with its own table, under their prefixes.

`config.json` of a LLaVA folder (Hugging Face's LlavaConfig, `text_config` and `vision_config` as the source models
wrote them) is the one place that sizes are read from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.config import LanguageModel, Llava, VisionModel
from megatron_patch.families.clip import CLIP
from megatron_patch.families.family import Family, Weight
from megatron_patch.families.llama import LLAMA
from megatron_patch.families.mistral import MISTRAL
from megatron_patch.families.projector import PROJECTOR
from megatron_patch.families.shapes import language_dims, projector_dims, vision_dims

LANGUAGE_FAMILIES = {family.name: family for family in (LLAMA, MISTRAL)}
VISION_FAMILIES = {family.name: family for family in (CLIP,)}

# LlavaConfig's settings that the network takes as given; an absent one means the first value.
REQUIRED = {
    "vision_feature_layer": (-2,),
    "vision_feature_select_strategy": ("default",),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
}

# The names that transformers' modules have since 4.52, turned into the hub's.
RENAMED = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(?=vision_tower\.|multi_modal_projector\.)", ""),
)


@dataclass(frozen=True)
class Part:
    """One of the three models and what precedes its tensors' names on either side (Hugging Face: the hub's names)."""

    family: Family
    num_layers: int
    mcore_prefix: str
    hf_prefix: str
    dims: dict[str, int]
    """Sizes, in the names of `shapes.py`."""

    def rows(self) -> Iterator[Weight]:
        """This part's table, prefixed and sized, every layer written out."""
        for weight in self.family.rows(self.num_layers):
            yield weight.prefixed(self.mcore_prefix, self.hf_prefix).sized(self.dims)

    def unused_names(self) -> list[str]:
        """The hub's names of the tensors that the network does not use and that are kept aside."""
        return [self.hf_prefix + name for name in self.family.unused_names(self.num_layers)]

    def hub_name(self, hf_name: str) -> str | None:
        """The hub's name of a tensor in this part's own checkpoint (not a LLaVA's); None: left out on purpose."""
        name = self.family.canonical(hf_name)
        return None if self.family.is_ignored(name) else self.hf_prefix + name


def parts(llava: Llava) -> tuple[Part, Part, Part]:
    """Language model, vision tower, projector."""
    language, vision = llava.language, llava.vision
    return (
        Part(
            family=LANGUAGE_FAMILIES[language.family],
            num_layers=language.num_layers,
            mcore_prefix="language_model.",
            hf_prefix="language_model.",
            dims=language_dims(language),
        ),
        Part(
            family=VISION_FAMILIES[vision.family],
            num_layers=vision.num_layers,
            mcore_prefix="vision_model.",
            hf_prefix="vision_tower.",
            dims=vision_dims(vision),
        ),
        Part(
            family=PROJECTOR,
            num_layers=0,
            mcore_prefix="vision_projection.",
            hf_prefix="multi_modal_projector.",
            dims=projector_dims(language, vision),
        ),
    )


def rows(llava: Llava) -> list[Weight]:
    """The whole model's table, sized."""
    return [weight for part in parts(llava) for weight in part.rows()]


def unused_names(llava: Llava) -> list[str]:
    """The hub's names of all tensors that are kept aside: the tower's last layer and its post-norm."""
    return [name for part in parts(llava) for name in part.unused_names()]


def hub_name(llava: Llava, hf_name: str) -> str | None:
    """The hub's name of a tensor in a whole LLaVA's checkpoint, whatever wrote it; None: left out on purpose."""
    for pattern, replacement in RENAMED:
        hf_name = re.sub(pattern, replacement, hf_name)
    for part in parts(llava):
        if hf_name.startswith(part.hf_prefix):
            return part.hub_name(hf_name.removeprefix(part.hf_prefix))
    return hf_name


def read_config(folder: Path) -> Llava:
    """Sizes of the LLaVA that `folder`/config.json describes. Raises ValueError or OSError that names the file."""
    path = Path(folder) / "config.json"
    try:
        return describe(json.loads(path.read_text()))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: missing; expected a folder made by hf2mcore_convertor_llava.sh or a LLaVA from Hugging Face"
        ) from None
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}, which a LLaVA's config.json holds") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def describe(hf_config: dict[str, Any]) -> Llava:
    """Sizes in megatron.core's names of what a LlavaConfig (as a dict) says."""
    if hf_config.get("model_type") != "llava":
        raise ValueError(f"model_type is {hf_config.get('model_type')!r}, expected 'llava'")
    for name, allowed in REQUIRED.items():
        if hf_config.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} is {hf_config[name]!r}, only {allowed[0]!r} is supported")
    return Llava(
        language=describe_language_model(hf_config["text_config"]),
        vision=describe_vision_model(hf_config["vision_config"]),
        image_token_id=hf_config.get("image_token_index", hf_config.get("image_token_id", 32000)),
    )


def describe_language_model(hf_config: dict[str, Any]) -> LanguageModel:
    """Sizes of a language model from its own config.json. Raises ValueError for a kind without a table."""
    family = _family(LANGUAGE_FAMILIES, hf_config, "language model")
    sizes = family.read_settings(hf_config)
    # transformers 4 has `rope_theta` and `rope_scaling`; 5 puts both into `rope_parameters`.
    rope = hf_config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters: rope_type {rope['rope_type']!r} is not supported yet, only 'default'")
    bases = {float(given["rope_theta"]) for given in (hf_config, rope) if given.get("rope_theta") is not None}
    if len(bases) > 1:
        raise ValueError(f"rope_theta and rope_parameters.rope_theta disagree: {' and '.join(map(str, sorted(bases)))}")
    sizes["rotary_base"] = bases.pop() if bases else 10000.0
    sizes["num_query_groups"] = sizes["num_query_groups"] or sizes["num_attention_heads"]
    sizes["kv_channels"] = sizes["kv_channels"] or sizes["hidden_size"] // sizes["num_attention_heads"]
    return LanguageModel(family=family.name, **sizes)


def describe_vision_model(hf_config: dict[str, Any]) -> VisionModel:
    """Sizes of a vision tower from its own config.json, a whole CLIPModel's included."""
    hf_config = vision_config(hf_config)
    family = _family(VISION_FAMILIES, hf_config, "vision tower")
    num_layers = hf_config.get("num_hidden_layers", 12) - family.unused_layers
    return VisionModel(family=family.name, num_layers=num_layers, **family.read_settings(hf_config))


def vision_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The vision half of a CLIPModel's config.json; a vision model's own is returned as it is."""
    if hf_config.get("model_type") != "clip":
        return hf_config
    return {"model_type": "clip_vision_model", **(hf_config.get("vision_config") or {})}


def _family(known: dict[str, Family], hf_config: dict[str, Any], what: str) -> Family:
    model_type = hf_config.get("model_type")
    if model_type not in known:
        raise ValueError(f"{what}: model_type {model_type!r} is not supported, only {', '.join(known)}")
    return known[model_type]
