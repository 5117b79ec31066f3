"""Sizes of a LLaVA, in megatron.core's names, as its config.json gives them. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Any

from megatron_patch.families.shapes import language_dims
from megatron_patch.families.table import LanguageFamily, Strategy, VisionFamily, Weight


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Sizes of a decoder-only language model, in the names of megatron.core's TransformerConfig and GPTModel."""

    family: LanguageFamily
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
    share_embeddings_and_output_weights: bool = False
    """Whether the output layer's weight is the embedding's (tied)."""

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The family's table, without an output layer where the embedding is it."""
        tied = self.share_embeddings_and_output_weights
        return tuple(weight for weight in self.family.weights if not (tied and weight.mcore == "output_layer.weight"))

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, embedding and output layer included (once, where they are one tensor)."""
        dims = language_dims(self)
        counts = {weight.mcore: math.prod(weight.sized(dims).shape) for weight in self.weights}
        return sum(count * (self.num_layers if "*" in name else 1) for name, count in counts.items())

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Rows of megatron.core's embedding: the vocabulary padded to a multiple of 128 x TP (Megatron-LM's rule)."""
        multiple = 128 * tensor_model_parallel_size
        return math.ceil(self.vocab_size / multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class VisionModel:
    """Sizes of a vision tower, in the names of megatron.core's TransformerConfig and CLIPViTModel."""

    family: VisionFamily
    num_layers: int
    """Layers that are built: up to the one whose output LLaVA takes."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    layernorm_epsilon: float
    patch_dim: int
    img_size: int
    num_unused_layers: int = 1
    """The checkpoint's layers after these."""
    select_strategy: Strategy = "default"

    @property
    def grid(self) -> int:
        """Patches along an edge of the image. Pixels that fill none are not seen."""
        return self.img_size // self.patch_dim

    @property
    def num_positions(self) -> int:
        """What a layer of the tower sees of one image: its patches, and a class token if there is one."""
        return self.grid**2 + self.family.has("class_token")

    @property
    def num_image_tokens(self) -> int:
        """Positions that one image takes in the text."""
        return self.num_positions - (self.select_strategy == "default")


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


def plain(sizes: LanguageModel | VisionModel) -> dict[str, Any]:
    """Sizes by their names, the family by its own: for files, and to be compared."""
    return {field.name: getattr(sizes, field.name) for field in fields(sizes)} | {"family": sizes.family.name}


def divisors(number: int) -> list[int]:
    """The numbers that divide `number`, from 1 up."""
    return [n for n in range(1, number + 1) if number % n == 0]


def listing(items: list[int]) -> str:
    """`[1, 2, 4]` -> "1, 2 or 4"."""
    *head, last = map(str, items)
    return f"{', '.join(head)} or {last}" if head else last
