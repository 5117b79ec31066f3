"""config.json of the LLaVA repository's checkpoints: what is read from it, and what is refused by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given

from megatron_patch.families.hf_config import describe_language_model, describe_vision_model
from megatron_patch.families.llava_repository import check_settings, check_tower, is_repository, text_config
from tests.unit.properties import changed, examples

# As llava-v1.5-7b has it.
LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True,
}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "patch_size": 14}


@pytest.mark.parametrize(
    ("said", "family"),
    [
        ({}, "llama"),
        ({"model_type": "llava_llama"}, "llama"),
        ({"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}, "mistral"),
        ({"architectures": ["LlavaMistralForCausalLM"]}, "mistral"),
        ({"model_type": "llava_qwen", "architectures": None}, "qwen2"),
        ({"architectures": [["x"]]}, "llama"),
    ],
)
def test_the_language_model(said, family):
    config = {**LLAVA, **said}
    assert is_repository(config)
    check_settings(config)
    text = text_config(config)
    assert text["model_type"] == describe_language_model(text).family.name == family
    assert not [name for name in text if "mm_" in name or "image" in name]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llava", "text_config": {}},
        {"model_type": "llama"},
        {"model_type": "llava"},
        {},
        {"model_type": []},
    ],
)
def test_what_is_not_of_the_repository(config):
    assert not is_repository(config)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
        ({"mm_projector_type": ...}, "mm_projector_type is 'linear'"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer is -1"),
        ({"mm_vision_select_layer": ...}, "mm_vision_select_layer is None"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_use_im_start_end": True}, "--use-im-start-end true"),
        ({"model_type": "llava_mpt"}, "model_type is 'llava_mpt'"),
    ],
)
def test_another_llava_is_refused(said, message):
    config = {name: value for name, value in {**LLAVA, **said}.items() if value is not ...}
    assert is_repository(config)
    with pytest.raises(ValueError, match=message):
        check_settings(config) or text_config(config)


@pytest.mark.parametrize(
    ("said", "fits"),
    [
        ({}, True),
        ({"image_size": 224}, False),
        ({"patch_size": 16}, False),
        ({"hidden_size": 768}, False),
    ],
)
def test_the_clip_is_the_one_that_is_named(said, fits):
    vision = describe_vision_model({**CLIP, **said})
    if fits:
        check_tower(LLAVA, vision, Path("clip"))
        return
    with pytest.raises(ValueError, match=r"clip: is a CLIP of width .* 'openai/clip-vit-large-patch14-336'"):
        check_tower(LLAVA, vision, Path("clip"))
    # Of a name that says nothing only the width is known.
    check_tower({**LLAVA, "mm_vision_tower": "mine", "mm_hidden_size": vision.hidden_size}, vision, Path("clip"))


def test_another_kind_of_tower_is_refused():
    """Of the same sizes, it would pass."""
    sizes = {"hidden_size": 768, "image_size": 224, "patch_size": 16}
    config = {**LLAVA, "mm_vision_tower": "openai/clip-vit-base-patch16", "mm_hidden_size": 768}
    check_tower(config, describe_vision_model({"model_type": "clip_vision_model", **sizes}), Path("tower"))
    with pytest.raises(ValueError, match=r"tower: is a siglip_vision_model, .* folder of 'openai/clip-vit-base"):
        check_tower(config, describe_vision_model({"model_type": "siglip_vision_model", **sizes}), Path("tower"))


@examples
@given(changed(LLAVA))
def test_whatever_it_says(config):
    if not is_repository(config):
        return
    try:
        check_settings(config)
        check_tower(config, describe_vision_model(CLIP), Path("clip"))
        describe_language_model(text_config(config))
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
