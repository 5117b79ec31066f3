"""Sizes of a LLaVA, in megatron.core's names, as its config.json gives them. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Sizes of a decoder-only language model, in the names of megatron.core's TransformerConfig and GPTModel."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    layernorm_epsilon: float
    vocab_size: int
    rotary_base: float
    max_position_embeddings: int
    sliding_window: int | None = None
    rope_scaling_factor: float | None = None
    """Llama 3's stretching of the rotary embedding, with the constants that megatron.core has; none: not stretched."""
    add_qkv_bias: bool = False
    share_embeddings_and_output_weights: bool = False
    """Whether the output layer's weight is the embedding's (tied)."""

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, embedding and output layer included (once, where they are one tensor)."""
        qkv = (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels
        heads = self.num_attention_heads * self.kv_channels
        layer = self.hidden_size * (qkv + heads + 3 * self.ffn_hidden_size + 2) + qkv * self.add_qkv_bias
        tables = 1 if self.share_embeddings_and_output_weights else 2
        return self.num_layers * layer + self.hidden_size * (tables * self.vocab_size + 1)

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Rows of megatron.core's embedding: the vocabulary padded to a multiple of 128 x TP (Megatron-LM's rule)."""
        multiple = 128 * tensor_model_parallel_size
        return math.ceil(self.vocab_size / multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class VisionModel:
    """Sizes of a CLIP vision tower, in the names of megatron.core's TransformerConfig and CLIPViTModel."""

    family: str
    num_layers: int
    """Layers that are built: one less than the checkpoint has, since LLaVA takes the second last one's output."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    layernorm_epsilon: float
    patch_dim: int
    img_size: int

    @property
    def num_image_tokens(self) -> int:
        """Positions that one image takes in the text: its patches, without the class token."""
        return (self.img_size // self.patch_dim) ** 2


@dataclass(frozen=True, kw_only=True)
class Llava:
    """What a checkpoint's config.json says about the whole model."""

    language: LanguageModel
    vision: VisionModel
    image_token_id: int
    """Id of `<image>` in the tokenizer. Never looked up in the embedding, so it may lie past the table."""

    def check_model_size(self, model_size: str) -> None:
        """Raise ValueError when `model_size` ("7B", "500M", "auto") is not the size of the language model."""
        if model_size == "auto":
            return
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([BbMm])", model_size)
        if not match:
            raise ValueError(
                f"--model-size {model_size}: expected a size such as 7B or 500M, or auto to take the model's own"
            )
        nominal = float(match[1]) * (1e9 if match[2] in "Bb" else 1e6)
        count = self.language.num_parameters
        if not 0.85 <= count / nominal <= 1.25:  # Llama 3.2 calls 1.24 billion 1B
            actual = f"{count / 1e9:.1f}B" if count >= 1e8 else f"{count / 1e6:.1f}M"
            raise ValueError(
                f"--model-size {model_size}: the language model's config.json describes {actual} parameters; "
                f"give the size of that model, another model, or auto to skip this check"
            )


def divisors(number: int) -> list[int]:
    """The numbers that divide `number`, from 1 up."""
    return [n for n in range(1, number + 1) if number % n == 0]


def listing(items: list[int]) -> str:
    """`[1, 2, 4]` -> "1, 2 or 4"."""
    *head, last = map(str, items)
    return f"{', '.join(head)} or {last}" if head else last
