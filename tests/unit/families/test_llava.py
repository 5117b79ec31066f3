"""Tables and sizes, held against transformers' own models and configs."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import chain

import pytest
import torch
from hypothesis import given
from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
from megatron.core.post_training.modelopt.gpt.state_dict_hooks import mcore_gpt_load_te_state_dict_pre_hook
from transformers import (
    CLIPConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from megatron_patch.families import hf_config
from megatron_patch.families import llava as families
from megatron_patch.families.fused_names import FUSED_NORMS, to_local_name, to_transformer_engine_name
from megatron_patch.families.shapes import hf_shapes
from megatron_patch.stores.hf import HfReader
from tests.tiny import LANGUAGE_SIZES, LLAMA3_ROPE, VISION_SIZES
from tests.unit import properties
from tests.unit.properties import damaged, examples, one_line

MISTRAL = {"model_type": "mistral", **LANGUAGE_SIZES, "rope_theta": 1e6, "sliding_window": None}
CLIP = {"model_type": "clip_vision_model", **VISION_SIZES}
LLAVA = {"model_type": "llava", "image_token_index": 300, "text_config": MISTRAL, "vision_config": CLIP}


def changed(config: dict, **changes) -> dict:
    return {name: value for name, value in {**config, **changes}.items() if value != "absent"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config])
def test_tables_hold_every_tensor_of_transformers_llava(tmp_path, config_class, tied):
    """Names and shapes, as save_pretrained writes them, are the tables' and the unused ones: no more, no less."""
    text = config_class(**{**LANGUAGE_SIZES, "tie_word_embeddings": tied})
    config = LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION_SIZES), image_token_index=299)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    llava = families.read_config(tmp_path)
    assert llava.language.share_embeddings_and_output_weights == tied
    assert set(families.pipeline_copies(llava)) == ({"language_model.output_layer.weight"} if tied else set())
    weights = HfReader(tmp_path, partial(families.hub_name, llava))
    expected = {
        name: shape for weight in families.rows(llava) for name, shape in zip(weight.hf, hf_shapes(weight), strict=True)
    }
    assert set(weights) == set(expected) | set(families.unused_shapes(llava, weights))
    assert not set(expected) & set(families.unused_shapes(llava, weights))
    assert {name: weights.shape(name) for name in expected} == expected


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_number_of_parameters_is_the_tables(kind, tied):
    llava = hf_config.describe({**LLAVA, "text_config": changed(MISTRAL, model_type=kind, tie_word_embeddings=tied)})
    (language, *_) = families.parts(llava)
    assert llava.language.num_parameters == sum(torch.Size(row.shape).numel() for row in language.rows())


def test_sizes_of_a_language_model():
    sizes = hf_config.describe_language_model(MISTRAL)
    assert (sizes.num_layers, sizes.hidden_size, sizes.num_query_groups, sizes.kv_channels) == (4, 96, 4, 16)
    assert (sizes.rotary_base, sizes.sliding_window, sizes.layernorm_epsilon) == (1e6, None, 1e-5)


def test_defaults_are_hugging_faces():
    minimal = hf_config.describe_language_model({"model_type": "mistral"})
    assert (minimal.sliding_window, minimal.num_query_groups, minimal.kv_channels) == (4096, 8, 128)
    assert minimal.rotary_base == 10000.0
    llama = hf_config.describe_language_model({"model_type": "llama", "head_dim": None})
    assert (llama.sliding_window, llama.num_query_groups, llama.kv_channels) == (None, 32, 128)
    qwen = hf_config.describe_language_model(
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}
    )
    assert (qwen.sliding_window, qwen.num_query_groups, qwen.vocab_size) == (None, 32, 151936)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
    ],
    ids=["transformers 4", "transformers 5", "both"],
)
def test_rope_theta(rope, expected):
    assert hf_config.describe_language_model(changed(MISTRAL, **rope)).rotary_base == expected


LLAMA3 = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": "absent", "rope_parameters": LLAMA3_ROPE},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3_ROPE},
    ],
    ids=["transformers 4", "transformers 5", "both"],
)
def test_rope_of_llama_3(rope):
    sizes = hf_config.describe_language_model(changed(MISTRAL, **rope))
    assert (sizes.rotary_base, sizes.rope_scaling_factor) == (5e5, 8.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported, only llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True; for qwen2 only False"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear': megatron.core has 'default' and"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 2.0}}, "high_freq_factor of rope_type 'llama3' is 2.0; mega"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}}, "is 4096; megatron.core has 8192"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "rope_scaling and rope_parameters dis"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "disagree: 7.0 and 1000000.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only models that rotate all of a head"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    ],
)
def test_what_the_network_does_not_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hf_config.describe_language_model(changed(MISTRAL, **changes))


def published(kind, hidden, ffn, layers, heads, groups, vocab, **more):
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocab}
    return {"model_type": kind, **sizes, "num_attention_heads": heads, "num_key_value_heads": groups, **more}


@pytest.mark.parametrize(
    ("name", "config", "parameters"),
    [
        ("7B", published("llama", 4096, 11008, 32, 32, 32, 32000, pretraining_tp=1), 6_738_415_616),  # Vicuna, Llama 2
        ("8B", published("llama", 4096, 14336, 32, 32, 8, 128256, rope_scaling=LLAMA3), 8_030_261_248),  # Llama 3.1
        ("1B", published("llama", 2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True), 1_235_814_400),  # 3.2
        ("7B", published("qwen2", 3584, 18944, 28, 28, 4, 152064, use_sliding_window=False), 7_615_616_512),  # Qwen2.5
        ("0.5B", published("qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True), 494_032_768),
    ],
)
def test_sizes_of_published_models(name, config, parameters):
    llava = hf_config.describe({**LLAVA, "text_config": config})
    assert llava.language.num_parameters == parameters
    llava.check_model_size(name)


def test_a_llava_of_the_hub_leaves_most_to_defaults():
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    tower = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096}
    tower |= {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}
    config = {"model_type": "llava", "text_config": text, "vision_config": tower, "image_token_index": 32000}
    llava = hf_config.describe({**config, "ignore_index": -100, "projector_hidden_act": "gelu", "vocab_size": 32064})
    assert (llava.image_token_id, llava.language.vocab_size, llava.language.num_layers) == (32000, 32064, 32)
    assert (llava.vision.num_layers, llava.vision.num_image_tokens) == (23, 576)
    assert hf_config.describe_vision_model({**tower, "image_size": 224}).num_image_tokens == 256


def test_a_list_of_one_layer_is_that_layer():
    assert hf_config.describe({**LLAVA, "vision_feature_layer": [-2]}) == hf_config.describe(LLAVA)


def test_vision_half_of_a_whole_clip():
    whole = CLIPConfig(vision_config=VISION_SIZES).to_dict()
    sizes = hf_config.describe_vision_model(whole)
    assert sizes == hf_config.describe_vision_model(CLIP)
    assert (sizes.num_layers, sizes.num_image_tokens) == (2, 16)
    assert hf_config.vision_config(whole)["model_type"] == "clip_vision_model"


def test_names_of_a_whole_clip_and_of_transformers_5():
    _, tower, _ = families.parts(hf_config.describe(LLAVA))
    hub = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert tower.hub_name("vision_model.encoder.layers.0.mlp.fc1.weight") == hub
    assert tower.hub_name("encoder.layers.0.mlp.fc1.weight") == hub
    for ignored in ("text_model.final_layer_norm.bias", "logit_scale", "visual_projection.weight"):
        assert tower.hub_name(ignored) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: missing"),
        ("{", r"config.json: not valid json \(Expecting"),
        ({"model_type": "mistral"}, "model_type is 'mistral', expected 'llava'"),
        *(
            ({**LLAVA, "vision_feature_layer": layer}, f"layer is {layer}; the tower has layers 1 to 3, or -3 to -1")
            for layer in (-4, 0, 4)
        ),
        *(
            (
                {**LLAVA, "vision_feature_layer": layer},
                f"layer is {re.escape(repr(layer))}; expected one layer's number",
            )
            for layer in ([-2, -2], [], True, "-2")
        ),
        ({**LLAVA, "vision_config": {**CLIP, "image_size": 6}}, "image_size is 6 and patch_size 7: .* has no position"),
        (
            {**LLAVA, "vision_config": {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 16}},
            "with vision_feature_select_strategy 'default' an image has no position",
        ),
        ({**LLAVA, "vision_feature_select_strategy": "cls"}, "strategy is 'cls'; expected 'default' or 'full'"),
        ({**LLAVA, "vision_feature_select_strategy": ["full"]}, "expected 'default' or 'full'"),
        ({"model_type": "llava"}, "has no 'text_config'"),
    ],
)
def test_unfit_config_json(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises((ValueError, OSError), match=message) as error:
        families.read_config(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("written", "hub"),
    [
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("language_model.lm_head.weight", "language_model.lm_head.weight"),
        ("model.vision_tower.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("vision_tower.vision_model.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("image_newline", "image_newline"),
    ],
)
def test_names_of_a_whole_llava(written, hub):
    assert families.hub_name(hf_config.describe(LLAVA), written) == hub


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])
def test_transformer_engine_names_are_those_in_megatron_cores_source(family):
    """Its list of a GPTModel's tensors in either spec, and the hook with which it turns fused names into local ones."""
    llava = hf_config.describe({**LLAVA, "text_config": family(**LANGUAGE_SIZES).to_dict()})
    local = [row.mcore for part in families.parts(llava)[:2] for row in part.rows()]
    fused = {to_transformer_engine_name(name): name for name in local}
    assert len(fused) == len(local)
    for name in fused:
        part, _, inner = name.partition(".")
        if part == "language_model":
            inner = re.sub(r"layers\.\d+\.", "layers.", inner)
            assert inner in DEFAULT_CONVERSION_DICT
            assert "input_layernorm" not in inner
            assert "pre_mlp_layernorm" not in inner
    mcore_gpt_load_te_state_dict_pre_hook(fused, "", {}, True, [], [], [])
    assert all(name == original for name, original in fused.items())


def test_transformer_engine_names():
    """The fused names as Transformer Engine's LayerNormLinear has them, in either direction."""
    prefix = "language_model.decoder.layers.3"
    fused = {
        f"{prefix}.input_layernorm.weight": f"{prefix}.self_attention.linear_qkv.layer_norm_weight",
        f"{prefix}.input_layernorm.bias": f"{prefix}.self_attention.linear_qkv.layer_norm_bias",
        f"{prefix}.pre_mlp_layernorm.weight": f"{prefix}.mlp.linear_fc1.layer_norm_weight",
        f"{prefix}.pre_mlp_layernorm.bias": f"{prefix}.mlp.linear_fc1.layer_norm_bias",
    }
    assert len(FUSED_NORMS) == len(fused)
    for name in chain(fused, ["language_model.decoder.final_layernorm.weight", "vision_model.ln_pre.weight"]):
        assert to_transformer_engine_name(name) == fused.get(name, name)
        assert to_local_name(to_transformer_engine_name(name)) == to_local_name(name) == name


@pytest.mark.parametrize(
    ("part", "setting", "message"),
    [
        ("text_config", {"num_hidden_layers": 30_000_000}, "num_hidden_layers is 30000000; .*, at most 4,096"),
        ("vision_config", {"num_hidden_layers": 30_000_000}, "num_hidden_layers is 30000000; .*, at most 4,096"),
        ("text_config", {"vocab_size": 2**31}, "vocab_size is 2147483648; .*, at most 2,147,483,647"),
        ("text_config", {"hidden_size": 10**400}, "hidden_size is a number of over 50 digits; .*, at most"),
        ("text_config", {"rope_theta": 10**400}, "rope_theta is a number of over 50 digits"),
        ("vision_config", {"image_size": -28}, "image_size is -28"),
        ("text_config", {"hidden_size": float("nan")}, "hidden_size is nan"),
        ("text_config", {"model_type": "x" * 5000}, "model_type 'xxx"),
    ],
)
def test_sizes_that_no_model_has(tmp_path, part, setting, message):
    content = {**LLAVA, part: {**LLAVA[part], **setting}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        families.read_config(tmp_path)
    assert len(str(error.value)) < 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("config")


@examples
@given(properties.changed(LLAVA))
def test_whatever_a_config_json_says(folder, content):
    (folder / "config.json").write_text(json.dumps(content))
    with one_line(folder):
        llava = families.read_config(folder)
        assert len(families.rows(llava)) < 2 * 16 * 4096
        assert llava.language.num_parameters > 0


@examples
@given(damaged(json.dumps(LLAVA).encode()))
def test_whatever_bytes_a_config_json_holds(folder, content):
    (folder / "config.json").write_bytes(content)
    with one_line(folder):
        families.read_config(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 20000 + "]" * 20000, "nested too deep"),
        ('{"a":' * 150 + "{}" + "}" * 150, "nested too deep"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        (json.dumps(LLAVA).encode("utf-16"), "expected text in UTF-8"),
        (b"\xef\xbb\xbf" + json.dumps(LLAVA).encode(), "BOM"),
        ("1" * 5000, "not valid json"),
    ],
)
def test_text_that_is_no_config_json(folder, content, message):
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        families.read_config(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
