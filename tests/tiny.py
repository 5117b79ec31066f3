"""Tiny Hugging Face models and tokenizers for tests, made here: nothing is downloaded."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_patch.conversion.commands import main as convert

# Awkward on purpose: three query heads per group, head_dim given and unlike hidden / heads, a vocabulary that 128 does
# not divide, a norm epsilon and a rope theta that are no default.
LANGUAGE_SIZES = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
VISION_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 32,
    "hidden_act": "quick_gelu",
}


def save_mistral(folder: Path, dtype: torch.dtype = torch.float32, **changed) -> Path:
    """A MistralForCausalLM with random weights, its tokenizer beside it."""
    settings = {**LANGUAGE_SIZES, "sliding_window": None, **_rope(500000.0), **changed}
    return _save(MistralForCausalLM, settings, folder, dtype)


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, **changed) -> Path:
    """A LlamaForCausalLM with random weights, its tokenizer beside it."""
    return _save(LlamaForCausalLM, {**LANGUAGE_SIZES, **_rope(10000.0), **changed}, folder, dtype)


def save_qwen2(folder: Path, dtype: torch.dtype = torch.float32, **changed) -> Path:
    """A Qwen2ForCausalLM with random weights, its tokenizer beside it."""
    return _save(Qwen2ForCausalLM, {**LANGUAGE_SIZES, **_rope(1e6), **changed}, folder, dtype)


# Llama 3's rotary embedding. At this base some of the eight frequencies are kept, one is between, some are divided.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LANGUAGE_MODELS = {
    "mistral": save_mistral,
    "llama 2": save_llama,
    "llama 3": partial(save_llama, rope_parameters=LLAMA3_ROPE, max_position_embeddings=16384),
    "llama 3 tied": partial(
        save_llama, rope_parameters=LLAMA3_ROPE, max_position_embeddings=16384, tie_word_embeddings=True
    ),
    "qwen 2": save_qwen2,
    "qwen 2 tied": partial(save_qwen2, tie_word_embeddings=True),
}
"""One of each kind; Vicuna is a Llama 2."""


def save_clip(folder: Path, dtype: torch.dtype = torch.float32, **changed) -> Path:
    """A CLIPVisionModel with random weights and its preprocessor_config.json."""
    config = CLIPVisionConfig(**{**VISION_SIZES, **changed})
    model = _random(CLIPVisionModel, config, dtype)
    model.save_pretrained(folder)
    size = config.image_size
    (Path(folder) / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": size},
                "resample": 3,
                "do_center_crop": True,
                "crop_size": {"height": size, "width": size},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "do_convert_rgb": True,
            }
        )
    )
    return Path(folder)


# Two pixels of each edge fill no patch, as six of 384 do in patches of 14.
SIGLIP_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 30,
    "patch_size": 7,
}


def save_siglip(folder: Path, dtype: torch.dtype = torch.float32, **changed) -> Path:
    """A SiglipVisionModel with random weights; how it takes images is its class's."""
    config = SiglipVisionConfig(**{**SIGLIP_SIZES, **changed})
    _random(SiglipVisionModel, config, dtype).save_pretrained(folder)
    size = {"height": config.image_size, "width": config.image_size}
    processor = {"image_processor_type": "SiglipImageProcessor", "size": size}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor))
    return Path(folder)


TOWERS = {"clip": save_clip, "siglip": save_siglip}


def save_mcore(folder: Path, llm: Path, clip: Path, tp: int = 2) -> Path:
    """Both as one Megatron-Core checkpoint in `folder`: shards for TP `tp`, fp32."""
    target = Path(folder) / f"tp{tp}"
    flags = {
        "--source-llm-ckpt-path": llm,
        "--source-clip-ckpt-path": clip,
        "--target-ckpt-path": target,
        "--tensor-model-parallel-size": tp,
        "--precision": "fp32",
    }
    assert convert([str(word) for pair in flags.items() for word in pair]) == 0
    return target


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens in a language model's folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = special + alphabet
    merges = [("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokens += ["".join(merge) for merge in merges]
    tokens += [f"<unused_{i}>" for i in range(vocab_size - len(tokens))]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def _rope(theta: float) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _random(model_class, config, dtype):
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases too: a mix-up between constant tensors would not be seen.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.08 * noise + (parameter if parameter.ndim == 1 else 0))
    return model.to(dtype).eval()


def _save(model_class, settings: dict, folder: Path, dtype) -> Path:
    """`settings`: as transformers 5 names them."""
    if transformers.__version__.startswith("4."):
        rope = {**settings.pop("rope_parameters")}
        settings["rope_theta"] = rope.pop("rope_theta")
        settings["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    config = model_class.config_class(**settings)
    _random(model_class, config, dtype).save_pretrained(folder)
    save_tokenizer(folder, config.vocab_size)
    return Path(folder)
