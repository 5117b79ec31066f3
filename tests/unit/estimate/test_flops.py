"""What is counted from the sizes is what torch counts while the tiny model computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_patch.estimate.flops import Work, megatron_lm_flops, step_flops
from megatron_patch.families.clip import CLIP
from megatron_patch.families.llava import read_config
from megatron_patch.families.mistral import MISTRAL
from megatron_patch.families.sizes import LanguageModel, Llava, VisionModel
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs

VISION = VisionModel(
    family=CLIP,
    num_layers=23,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    layernorm_epsilon=1e-5,
    patch_dim=14,
    img_size=336,
)


def added_product(of_sum: torch.Size, left: torch.Size, right: torch.Size, **unused: object) -> int:
    """Operations of `sum.addmm_(left, right)`."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("freeze_lm", [False, True])
@pytest.mark.parametrize("freeze_vit", [False, True])
@pytest.mark.parametrize("has_class_token", [False, True])
def test_flops_are_those_that_torch_counts(mcore, mcore_siglip, tmp_path, has_class_token, freeze_lm, freeze_vit):
    folder = mcore if has_class_token else mcore_siglip
    config = tiny_runs.config(folder, tmp_path, freeze_lm=freeze_lm, freeze_vit=freeze_vit, use_flash_attn=False)
    llava = read_config(folder)
    _, wrapped, optimizer, _ = start_or_resume(config, llava)
    in_place = {torch.ops.aten.addmm_: added_product}  # of weights' gradients; torch counts the other form alone
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step = train_step(wrapped, optimizer, iter(tiny_runs.batches(llava, 2)), batch_runner(config, llava))
    assert step.totals == replace(step.totals, num_positions=4 * 60, num_pairs=4 * 60**2, num_images=4)
    assert sum(step_flops(llava, config.model, step.totals).values()) == counter.get_total_flops()


def test_the_convention_is_megatron_lms():
    """Its formula for a dense model with grouped queries and SwiGLU, at Mistral-7B's sizes, two texts of 1,000."""
    h, f, layers, v, s, q, kv = 4096, 14336, 32, 32768, 1000, 32 * 128, 8 * 128
    layer = h * (q + 2 * kv) + q * s / 2 * 2 + q * h + 3 * h * f
    language = LanguageModel(
        family=MISTRAL,
        num_layers=layers,
        hidden_size=h,
        ffn_hidden_size=f,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=128,
        layernorm_epsilon=1e-5,
        vocab_size=v,
        rotary_base=1e6,
        max_position_embeddings=32768,
    )
    work = Work(num_positions=2 * s, num_pairs=2 * s**2, num_images=0, num_labels=60)
    llava = Llava(language=language, vision=VISION, image_token_id=0)
    assert megatron_lm_flops(llava, work) == 2 * s * 3 * 2 * (layers * layer + h * v)
