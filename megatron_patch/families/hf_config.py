"""config.json and the processor's files, in both directions: what they say of a LLaVA, and what is written of one.

`config.json` is Hugging Face's LlavaConfig, with `text_config` and `vision_config` as the source models wrote them.
"""

from __future__ import annotations

from typing import Any, TypeVar

from megatron_patch.families.registry import LANGUAGE_FAMILIES, VISION_FAMILIES
from megatron_patch.families.sizes import LanguageModel, Llava, VisionModel
from megatron_patch.families.table import MAX_SIZE, Family, Strategy, checked, short

F = TypeVar("F", bound=Family)

# LlavaConfig's settings that the network takes as given; an absent one means the first value.
REQUIRED = {
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
}

# What megatron.core's rotary embedding takes as given when it is stretched (_apply_scaling in its
# rotary_pos_embedding.py): as Llama 3.1, 3.2 and 3.3 have it.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def describe(hf_config: dict[str, Any]) -> Llava:
    """Sizes in megatron.core's names of what a LlavaConfig (as a dict) says."""
    if hf_config.get("model_type") != "llava":
        raise ValueError(f"model_type is {short(hf_config.get('model_type'))}, expected 'llava'")
    _check_not_quantized(hf_config)
    for name, allowed in REQUIRED.items():
        given = hf_config.get(name, allowed[0])
        if given not in allowed:
            raise ValueError(f"{name} is {short(given)}, only {allowed[0]!r} is supported")
    text, tower = (checked(name, hf_config[name], dict) for name in ("text_config", "vision_config"))
    return Llava(
        language=describe_language_model(text),
        vision=describe_vision_model(tower, *features(hf_config)),
        image_token_id=_image_token_id(hf_config),
    )


def features(hf_config: dict[str, Any]) -> tuple[int, Strategy]:
    """Which of the tower's hidden states are taken, and which of their positions."""
    layer = hf_config.get("vision_feature_layer", -2)
    # transformers puts the features of several layers side by side: those of one are as they are.
    if isinstance(layer, list) and len(layer) == 1:
        (layer,) = layer
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ValueError(f"vision_feature_layer is {short(layer)}; expected one layer's number, such as -2")
    strategy = hf_config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise ValueError(f"vision_feature_select_strategy is {short(strategy)}; expected 'default' or 'full'")
    return layer, strategy


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
    sizes["num_query_groups"] = sizes["num_query_groups"] or sizes["num_attention_heads"]
    sizes["kv_channels"] = sizes["kv_channels"] or sizes["hidden_size"] // sizes["num_attention_heads"]
    return LanguageModel(family=family, **sizes)


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


def describe_vision_model(
    hf_config: dict[str, Any], feature_layer: int | None = None, select_strategy: Strategy | None = None
) -> VisionModel:
    """Sizes of a vision tower from its own config.json, or a whole CLIPModel's and the like.

    `feature_layer`: of the hidden states, 0 being the embedding. None, as for `select_strategy`: as a new LLaVA has it.
    """
    _check_not_quantized(hf_config)
    hf_config = vision_config(hf_config)
    family = _family(VISION_FAMILIES, hf_config, "vision tower")
    settings = family.read_settings(hf_config)
    there = settings.pop("num_layers")
    layer = family.feature_layer if feature_layer is None else feature_layer
    num_layers = layer if layer >= 0 else there + 1 + layer
    if not 1 <= num_layers <= there:
        raise ValueError(
            f"vision_feature_layer is {short(layer)}; the tower has layers 1 to {there}, or -{there} to -1"
        )
    tower = VisionModel(
        family=family,
        num_layers=num_layers,
        num_unused_layers=there - num_layers,
        select_strategy=select_strategy or family.select_strategy,
        **settings,
    )
    if tower.grid < 1 or tower.num_image_tokens < 1:
        raise ValueError(
            f"image_size is {tower.img_size} and patch_size {tower.patch_dim}: with vision_feature_select_strategy "
            f"{tower.select_strategy!r} an image has no position"
        )
    return tower


def vision_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The vision half of a whole CLIPModel's config.json and the like; a tower's own is returned as it is."""
    for family in VISION_FAMILIES.values():
        if hf_config.get("model_type") == family.whole_model:
            half = checked("vision_config", hf_config.get("vision_config", {}), dict)
            return {"model_type": family.name, **half}
    return hf_config


def _family(known: dict[str, F], hf_config: dict[str, Any], what: str) -> F:
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        raise ValueError(f"{what}: model_type {short(model_type)} is not supported, only {', '.join(known)}")
    return known[model_type]


def llava_config(text: dict[str, Any], tower: dict[str, Any], image_token_index: int = 0) -> dict[str, Any]:
    """A LlavaConfig of a language model's and a tower's (or a whole CLIPModel's) config.json, kept as they are."""
    tower = vision_config(tower)
    family = _family(VISION_FAMILIES, tower, "vision tower")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token_index,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_feature_layer": family.feature_layer,
        "vision_feature_select_strategy": family.select_strategy,
        "text_config": text,
        "vision_config": tower,
    }


def exported_config(config: dict[str, Any], llava: Llava, vocab_size: int, dtype: str) -> dict[str, Any]:
    """The config.json of an export: `config`, with every size said outright.

    transformers 4.57 and 5 differ in defaults and names (`rope_theta` against `rope_parameters`, `torch_dtype` against
    `dtype`; a Mistral without `sliding_window` has one of 4096), so nothing is left to a default, and both names stand.
    """
    types = {"dtype": dtype, "torch_dtype": dtype}
    text = {**config["text_config"], **language_settings(llava.language), **types, "vocab_size": vocab_size}
    tower = {**config["vision_config"], **vision_settings(llava.vision), **types}
    sizes = {"image_seq_length": llava.vision.num_image_tokens, "image_token_index": llava.image_token_id}
    if "vocab_size" in config:  # the first LLaVAs of the hub repeat it here
        sizes["vocab_size"] = vocab_size
    whole = {
        "architectures": ["LlavaForConditionalGeneration"],
        "tie_word_embeddings": llava.language.share_embeddings_and_output_weights,
    }
    return {**config, **whole, **types, **sizes, "text_config": text, "vision_config": tower}


def language_settings(model: LanguageModel) -> dict[str, Any]:
    """A language model's sizes in Hugging Face's names, for transformers 4 and 5."""
    settings = {setting.hf: getattr(model, setting.mcore) for setting in model.family.settings}
    rope = {"rope_type": "default"}
    if model.rope_scaling_factor is not None:
        rope = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3_ROPE}
    parameters = {"rope_theta": model.rotary_base, "rope_parameters": {**rope, "rope_theta": model.rotary_base}}
    return {**settings, **parameters, "rope_scaling": None if model.rope_scaling_factor is None else rope}


def vision_settings(model: VisionModel) -> dict[str, Any]:
    """A vision tower's sizes in Hugging Face's names. Its layers include the ones that are not built."""
    settings = {setting.hf: getattr(model, setting.mcore) for setting in model.family.settings}
    return {**settings, "num_hidden_layers": model.num_layers + model.num_unused_layers}


def preprocessor_config(model: VisionModel) -> dict[str, Any]:
    """The family's image transform at the tower's size, for a tower that comes without preprocessor_config.json."""
    family = model.family
    sized = {
        name: dict.fromkeys(value, model.img_size) if isinstance(value, dict) else value
        for name, value in family.image_settings.items()
    }
    return {
        "image_processor_type": family.image_processor,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        **sized,
    }


def processor_config(model: VisionModel) -> dict[str, Any]:
    """LlavaProcessor's settings, by which an image becomes `num_image_tokens` placeholders."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "num_additional_image_tokens": model.num_positions - model.grid**2,
        "patch_size": model.patch_dim,
        "vision_feature_select_strategy": model.select_strategy,
    }
