"""LLaVA: a language model, a vision tower and a projector, each with its own table, under their prefixes.

`config.json` of a LLaVA folder (Hugging Face's LlavaConfig, `text_config` and `vision_config` as the source models
wrote them) is the one place that sizes are read from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_patch.families.clip import CLIP
from megatron_patch.families.llama import LLAMA
from megatron_patch.families.mistral import MISTRAL
from megatron_patch.families.projector import PROJECTOR
from megatron_patch.families.qwen2 import QWEN2
from megatron_patch.families.shapes import language_dims, projector_dims, vision_dims
from megatron_patch.families.sizes import LanguageModel, Llava, VisionModel
from megatron_patch.families.table import MAX_SIZE, Family, Weight, checked, short
from megatron_patch.files.json_object import read_json
from megatron_patch.files.names import CONFIG

LANGUAGE_FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2)}
VISION_FAMILIES = {family.name: family for family in (CLIP,)}

# LlavaConfig's settings that the network takes as given; an absent one means the first value.
REQUIRED = {
    "vision_feature_layer": (-2,),
    "vision_feature_select_strategy": ("default",),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
}

# What megatron.core's rotary embedding takes as given when it is stretched (_apply_scaling in its
# rotary_pos_embedding.py): as Llama 3.1, 3.2 and 3.3 have it.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# A tied model has no output layer of its own. The last of several pipeline stages holds a copy of the embedding under
# that name; on a single stage, and in torch_dist, there is none.
EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT_LAYER = "language_model.output_layer.weight"

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
            family=_language_family(language),
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


def pipeline_copies(llava: Llava) -> dict[str, str]:
    """megatron.core's tensors that the last of several pipeline stages holds a second time: copy -> original."""
    return {OUTPUT_LAYER: EMBEDDING} if llava.language.share_embeddings_and_output_weights else {}


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
    path = Path(folder) / CONFIG
    config = read_json(path, "a folder made by hf2mcore_convertor_llava.sh or a LLaVA from Hugging Face")
    try:
        return describe(config)
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}, which a LLaVA's config.json holds") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def describe(hf_config: dict[str, Any]) -> Llava:
    """Sizes in megatron.core's names of what a LlavaConfig (as a dict) says."""
    if hf_config.get("model_type") != "llava":
        raise ValueError(f"model_type is {short(hf_config.get('model_type'))}, expected 'llava'")
    _check_not_quantized(hf_config)
    for name, allowed in REQUIRED.items():
        given = hf_config.get(name, allowed[0])
        # transformers puts the features of several layers side by side: those of one are as they are.
        if (given[0] if isinstance(given, list) and len(given) == 1 else given) not in allowed:
            raise ValueError(f"{name} is {short(given)}, only {allowed[0]!r} is supported")
    return Llava(
        language=describe_language_model(checked("text_config", hf_config["text_config"], dict)),
        vision=describe_vision_model(checked("vision_config", hf_config["vision_config"], dict)),
        image_token_id=_image_token_id(hf_config),
    )


def _image_token_id(hf_config: dict[str, Any]) -> int:
    value = hf_config.get("image_token_index", hf_config.get("image_token_id", 32000))
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SIZE:
        raise ValueError(f"image_token_index is {short(value)}; expected a token's id")
    return value


def describe_language_model(hf_config: dict[str, Any]) -> LanguageModel:
    """Sizes of a language model from its own config.json. Raises ValueError for a kind without a table."""
    _check_not_quantized(hf_config)
    family = _family(LANGUAGE_FAMILIES, hf_config, "language model")
    sizes = family.read_settings(hf_config)
    sizes["rotary_base"], sizes["rope_scaling_factor"] = _rope(hf_config)
    sizes["add_qkv_bias"] = any(weight.mcore.endswith("linear_qkv.bias") for weight in family.weights)
    sizes["num_query_groups"] = sizes["num_query_groups"] or sizes["num_attention_heads"]
    sizes["kv_channels"] = sizes["kv_channels"] or sizes["hidden_size"] // sizes["num_attention_heads"]
    return LanguageModel(family=family.name, **sizes)


def _check_not_quantized(hf_config: dict[str, Any]) -> None:
    if hf_config.get("quantization_config") is not None:
        raise ValueError("quantization_config: quantized weights are not supported; give the bf16, fp16 or fp32 model")


def _rope(hf_config: dict[str, Any]) -> tuple[float, float | None]:
    """Base and Llama 3's factor of the rotary embedding. Raises ValueError for what megatron.core does not have.

    transformers 4 has `rope_theta` and `rope_scaling`; 5 puts both into `rope_parameters`, and an export has all three.
    """
    named = {name: hf_config.get(name) for name in ("rope_scaling", "rope_parameters")}
    given = [checked(name, rope, dict) for name, rope in named.items() if rope is not None and rope != {}]
    thetas = (rope.get("rope_theta") for rope in (hf_config, *given))
    bases = {float(checked("rope_theta", theta, float)) for theta in thetas if theta is not None}
    if len(bases) > 1:
        raise ValueError(f"rope_theta and rope_parameters.rope_theta disagree: {' and '.join(map(str, sorted(bases)))}")
    for rope in (hf_config, *given):
        share = rope.get("partial_rotary_factor")
        if share is not None and (isinstance(share, bool) or share != 1):
            raise ValueError(
                f"partial_rotary_factor is {short(share)}; only models that rotate all of a head are supported"
            )
    factors = {_rope_factor(rope) for rope in given}
    if len(factors) > 1:
        raise ValueError("rope_scaling and rope_parameters disagree; keep one of them")
    return bases.pop() if bases else 10000.0, factors.pop() if factors else None


def _rope_factor(rope: dict[str, Any]) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"rope_type {short(kind)}: megatron.core has 'default' and 'llama3'; use a model with one of them"
        )
    for name, value in LLAMA3_ROPE.items():
        if rope[name] != value:
            raise ValueError(f"{name} of rope_type 'llama3' is {short(rope[name])}; megatron.core has {value} fixed")
    return float(checked("factor of rope_type 'llama3'", rope["factor"], float))


def describe_vision_model(hf_config: dict[str, Any]) -> VisionModel:
    """Sizes of a vision tower from its own config.json, a whole CLIPModel's included."""
    _check_not_quantized(hf_config)
    hf_config = vision_config(hf_config)
    family = _family(VISION_FAMILIES, hf_config, "vision tower")
    num_layers = checked("num_hidden_layers", hf_config.get("num_hidden_layers", 12), int)
    return VisionModel(
        family=family.name, num_layers=num_layers - family.unused_layers, **family.read_settings(hf_config)
    )


def vision_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The vision half of a CLIPModel's config.json; a vision model's own is returned as it is."""
    if hf_config.get("model_type") != "clip":
        return hf_config
    return {"model_type": "clip_vision_model", **checked("vision_config", hf_config.get("vision_config", {}), dict)}


def _language_family(language: LanguageModel) -> Family:
    family = LANGUAGE_FAMILIES[language.family]
    if not language.share_embeddings_and_output_weights:
        return family
    own = tuple(weight for weight in family.weights if not OUTPUT_LAYER.endswith(weight.mcore))
    return replace(family, weights=own)


def _family(known: dict[str, Family], hf_config: dict[str, Any], what: str) -> Family:
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        raise ValueError(f"{what}: model_type {short(model_type)} is not supported, only {', '.join(known)}")
    return known[model_type]
