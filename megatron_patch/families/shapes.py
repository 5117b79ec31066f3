"""Shapes of megatron.core's parameters. They belong to its modules, so every family shares them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_patch.families.sizes import LanguageModel, VisionModel
    from megatron_patch.families.table import Weight

# The end of a parameter's name -> the names of its dimensions. A bias has its weight's first dimension.
SHAPES = {
    "word_embeddings.weight": ("vocab", "hidden"),
    "output_layer.weight": ("vocab", "hidden"),
    "layernorm.weight": ("hidden",),
    "ln_pre.weight": ("hidden",),
    "linear_qkv.weight": ("qkv", "hidden"),
    "linear_proj.weight": ("hidden", "heads"),
    "linear_fc1.weight": ("ffn", "input"),
    "linear_fc2.weight": ("hidden", "ffn"),
    "conv1.weight": ("hidden", "colors", "patch", "patch"),
    "position_embeddings.weight": ("positions", "hidden"),
    "class_token": ("one", "one", "hidden"),
}


def whole_shape(name: str, layout: str, dims: dict[str, int]) -> tuple[int, ...]:
    """Shape of a parameter before tensor parallelism and without padding of the vocabulary.

    Raises KeyError for a name that `SHAPES` does not know.
    """
    is_bias = name.endswith(".bias")
    weight = name.removesuffix("bias") + "weight" if is_bias else name
    (axes,) = (axes for end, axes in SHAPES.items() if weight.endswith(end))
    first, *rest = (dims[axis] for axis in axes)
    if layout == "gated":
        first *= 2
    return (first,) if is_bias else (first, *rest)


def hf_shapes(weight: Weight) -> tuple[tuple[int, ...], ...]:
    """Shapes of Hugging Face's tensors of a sized row, in the order of its names.

    What `layout.split` gives. (Not asked of it with meta tensors: joining those makes torch import its compiler.)
    """
    rows, *others = weight.shape
    if weight.layout == "qkv":
        keys = weight.num_query_groups * weight.kv_channels
        return tuple((length, *others) for length in (rows - 2 * keys, keys, keys))
    if weight.layout == "gated":
        return ((rows // 2, *others),) * 2
    return (weight.shape[-1:],) if weight.layout == "class_token" else (tuple(weight.shape),)


def language_dims(model: LanguageModel) -> dict[str, int]:
    """What the names in `SHAPES` mean in a language model."""
    return {
        "vocab": model.vocab_size,
        **_transformer_dims(model, model.num_query_groups, model.kv_channels),
    }


def vision_dims(model: VisionModel) -> dict[str, int]:
    """What the names in `SHAPES` mean in a vision tower: every head has its own key and value."""
    return {
        "one": 1,
        "colors": 3,
        "patch": model.patch_dim,
        "positions": model.num_positions,
        **_transformer_dims(model, model.num_attention_heads, model.hidden_size // model.num_attention_heads),
    }


def projector_dims(language: LanguageModel, vision: VisionModel) -> dict[str, int]:
    """What the names in `SHAPES` mean in LLaVA-1.5's projector, which is as wide as the language model."""
    width = language.hidden_size
    return {"hidden": width, "ffn": width, "input": vision.hidden_size, "groups": 1, "kv_channels": 1}


def _transformer_dims(model: LanguageModel | VisionModel, groups: int, kv_channels: int) -> dict[str, int]:
    return {
        "hidden": model.hidden_size,
        "input": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "heads": model.num_attention_heads * kv_channels,
        "qkv": (model.num_attention_heads + 2 * groups) * kv_channels,
        "groups": groups,
        "kv_channels": kv_channels,
    }
