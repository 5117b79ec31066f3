"""Floating-point operations of a training step, counted from the model's sizes. Plain arithmetic.

Counted are matrix products alone, 2 m n k for [m, k] x [k, n], as in Megatron-LM's num_floating_point_operations
(megatron/training/training.py) and in the appendix of PaLM (arXiv:2204.02311). Norms, activations, softmax, embedding
and optimizer are left out, and so is recomputation: the same work done twice is no more work. What ranks do alike (the
vision tower on context-parallel ranks) counts once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_patch.config.train import Model
from megatron_patch.families.llava import Part, parts
from megatron_patch.families.sizes import Llava


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a global batch holds, summed over its micro batches."""

    num_positions: int
    """b x s, padding included."""
    num_pairs: int
    """b x s x s: what attention compares."""
    num_images: int
    num_labels: int


def step_flops(llava: Llava, model: Model, work: Work) -> dict[str, float]:
    """Part of the model -> what a step computes there: forward, and the gradients that are asked for.

    A trained matrix costs three passes (output, gradient of the input, gradient of the weight). A frozen one costs two
    where something trained comes before it, else one. Tokens are predicted at labels alone.
    """
    language = 3 if model.trains("language_model") else 2
    vision = 3 if model.trains("vision_model") else 1
    times = {
        "vision patches": 2 if model.trains("vision_model") else 1,  # pixels need no gradient
        "vision layers": vision,
        "projector": 3,
        "language layers": language,
        "language attention": 3,  # no weights: both of its inputs need gradients
        "vocabulary": language,
    }
    share = 0.5 if model.use_flash_attn else 1.0  # the unfused attention computes what it then masks
    forward = forward_flops(llava, work, num_predicted=work.num_labels, attention_share=share)
    return {part: times[part] * flops for part, flops in forward.items()}


def megatron_lm_flops(llava: Llava, work: Work) -> float:
    """Megatron-LM's convention: three times the forward pass, predicting at every position, as if all were trained."""
    return 3 * sum(forward_flops(llava, work, num_predicted=work.num_positions, attention_share=0.5).values())


def forward_flops(llava: Llava, work: Work, *, num_predicted: int, attention_share: float) -> dict[str, float]:
    """Part of the model -> operations of one forward pass.

    `num_predicted`: positions at which tokens are predicted. `attention_share`: part of all pairs that causal attention
    computes; half of them by convention.
    """
    vision, language = llava.vision, llava.language
    text, tower, connector = parts(llava)
    images, length = work.num_images, vision.num_positions
    heads = language.num_attention_heads * language.kv_channels

    def products(part: Part, name: str) -> int:
        return 2 * sum(part.matrices(name).values())

    # Attention: scores, and their sum over the values, 2 operations each per pair and channel.
    vision_layer = products(tower, ".layers.") + 4 * length * vision.hidden_size
    return {
        "vision patches": images * vision.grid**2 * products(tower, "conv1."),
        "vision layers": images * length * vision.num_layers * vision_layer,
        "projector": images * vision.num_image_tokens * products(connector, ""),
        "language layers": work.num_positions * language.num_layers * products(text, ".layers."),
        "language attention": attention_share * work.num_pairs * language.num_layers * 4 * heads,
        "vocabulary": num_predicted * 2 * language.hidden_size * language.padded_vocab_size(1),
    }
