"""The predicted time against an estimate made by hand, and what each setting adds to it.

The estimate is of the 7B model's first stage, made from counts of kernels and bytes by someone else than the code's
author; no figure is of a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_patch.config.train import Config, Parallel
from megatron_patch.estimate.cards import CARDS, COLLECTIVE, KERNELS, LAUNCH, Kernels, find_card
from megatron_patch.estimate.time import Time, matmul_seconds, predict
from tests.tiny_runs import config
from tests.unit.config.test_train import LLAVA

# megatron.core's own rotary embedding and SwiGLU, operation by operation; SwiGLU compiled; the rotation too.
UNFUSED = Kernels(rope=(12, 12.8), swiglu=(7, 13), launches=(38, 39), syncs=6, handover=1.5e-3, gradient_bytes=12)
FUSED_SWIGLU = replace(UNFUSED, swiglu=(3, 5))
FUSED = replace(FUSED_SWIGLU, rope=(2, 2))
WITHOUT_SYNCS = replace(FUSED, syncs=0)


def stage_one(cut: Parallel | None = None, **changed) -> Config:
    """The projector alone is trained, in bf16; 256 samples an iteration."""
    settings = {"precision": "bf16", "freeze_lm": True, "freeze_vit": True, "decoder_seq_length": 1024}
    settings |= {"micro_batch_size": 1, "global_batch_size": 256, **changed}
    return config(Path("weights"), Path("out"), parallel=cut, **settings)


def time_of(world_size: int = 1, *, card: str = "H100", kernels: Kernels = KERNELS, **settings) -> Time:
    return predict(stage_one(**settings), LLAVA, world_size, CARDS[card], kernels)


@pytest.mark.parametrize(
    ("kernels", "micro_batch", "h100", "h200"),
    [
        (UNFUSED, 1, 55, 53),
        (UNFUSED, 8, 37.4, 35),
        (FUSED_SWIGLU, 8, 34.9, 33.2),
        (FUSED, 8, 33.3, 32.2),
        (WITHOUT_SYNCS, 1, 44.5, 42),
    ],
    ids=["unfused, 1", "unfused, 8", "SwiGLU, 8", "SwiGLU and RoPE, 8", "no syncs, 1"],
)
def test_milliseconds_of_a_sample(kernels, micro_batch, h100, h200):
    for card, expected in (("H100", h100), ("H200", h200)):
        time = time_of(card=card, kernels=kernels, micro_batch_size=micro_batch)
        assert 1e3 / time.samples == pytest.approx(expected, rel=0.1)
        assert time.bound == "GPU"
        assert time.share == pytest.approx(18.2e12 * time.samples / 989e12, rel=0.01)  # 18.2 TFLOP a sample


def test_four_tensor_parallel_ranks_are_bound_by_launches():
    time = time_of(4, kernels=UNFUSED, cut=Parallel(tensor_model_parallel_size=4), recompute="sel")
    assert 1e3 / time.samples == pytest.approx(42, rel=0.1)
    assert time.bound == "launches"
    assert time.share == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize(
    ("card", "world_size", "sizes", "expected"),
    [("H200", 1, {"global_batch_size": 32}, 0.29), ("H100", 8, {"micro_batch_size": 4}, 0.45)],
)
def test_full_finetuning_adds_gradients_and_optimizer(card, world_size, sizes, expected):
    time = time_of(world_size, card=card, kernels=UNFUSED, freeze_lm=False, **sizes)
    assert time.share == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("tokens", "expected"), [(4992, 640e12), (624, 450e12)])
def test_fewer_tokens_fill_fewer_multiprocessors(tokens, expected):
    card = CARDS["H100"]
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    shapes += [(inputs, outputs) for outputs, inputs in shapes]  # gradients
    seconds = sum(matmul_seconds(card, card.matmul, tokens, n, k, 2) for n, k in shapes)
    assert sum(2 * tokens * n * k for n, k in shapes) / seconds == pytest.approx(expected, rel=0.05)


def test_few_labels_are_bound_by_the_vocabulary_that_is_read():
    card = CARDS["H100"]
    assert matmul_seconds(card, card.matmul, 30, 32768, 4096, 2) == pytest.approx(
        2 * 32768 * 4096 / card.copy, rel=0.01
    )


def collectives(cut: Parallel, **settings) -> int:
    """Collectives that another layer of the language model adds, by what the CPU needs for them."""
    one = replace(LLAVA, language=replace(LLAVA.language, num_layers=1))
    two = replace(LLAVA, language=replace(LLAVA.language, num_layers=2))
    none = replace(KERNELS, launches=(0, 0))
    times = [predict(stage_one(cut, **settings), llava, 4, CARDS["H100"], none).launches for llava in (one, two)]
    return round((times[1] - times[0]) / COLLECTIVE)


@pytest.mark.parametrize(
    ("sizes", "settings", "expected"),
    [
        ({"tensor_model_parallel_size": 4}, {}, 8),
        ({"tensor_model_parallel_size": 4}, {"freeze_lm": False}, 10),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": False}, {}, 4),
        ({"tensor_model_parallel_size": 4}, {"recompute": "full"}, 12),
        ({"context_parallel_size": 4}, {}, 4),
        ({"context_parallel_size": 2, "tensor_model_parallel_size": 2}, {}, 12),
        ({}, {}, 0),
    ],
)
def test_collectives_of_a_layer(sizes, settings, expected):
    assert collectives(Parallel(**sizes), **settings) == expected


def test_recomputation_costs_time():
    none, sel, full = (time_of(recompute=recompute) for recompute in ("none", "sel", "full"))
    assert none.compute < sel.compute < full.compute
    assert full.launches - none.launches == pytest.approx(32 * KERNELS.launches[0] * LAUNCH)
    half = time_of(recompute="full", recompute_method="block", recompute_num_layers=16)
    assert half.compute == pytest.approx((none.compute + full.compute) / 2)


def test_more_ranks_share_the_samples():
    one, four = time_of(1, micro_batch_size=8), time_of(4, micro_batch_size=8)
    assert four.samples == pytest.approx(4 * one.samples, rel=0.02)
    assert four.share == pytest.approx(one.share, rel=0.02)


def test_the_pipeline_fills_and_empties():
    cut = Parallel(pipeline_model_parallel_size=4)
    time = time_of(4, cut=cut, micro_batch_size=8)
    micro_batch = max(time.compute + time.communication + time.idle, time.launches)
    assert time.iteration == pytest.approx((32 + 3) * micro_batch, rel=0.01)
    interleaved = time_of(4, cut=replace(cut, virtual_pipeline_model_parallel_size=2), micro_batch_size=8)
    assert interleaved.iteration == pytest.approx((32 + 1.5) * micro_batch, rel=0.01)


def test_overlapped_gradients_hide_behind_a_micro_batch():
    plain, overlapped = (
        time_of(8, cut=Parallel(overlap_grad_reduce=overlap), micro_batch_size=4, freeze_lm=False).iteration
        for overlap in (False, True)
    )
    held = 7_270_000_000
    assert plain - overlapped == pytest.approx(4 * held * 7 / 8 / CARDS["H100"].link, rel=0.05)


def test_other_settings_that_take_time():
    usual = time_of(micro_batch_size=8)
    assert time_of(micro_batch_size=8, use_flash_attn=False).iteration > 1.1 * usual.iteration
    assert time_of(micro_batch_size=8, recompute="offload").iteration > 2 * usual.iteration
    assert time_of(micro_batch_size=8, precision="fp32").iteration > 5 * usual.iteration
    full = {"micro_batch_size": 8, "freeze_lm": False}
    assert time_of(**full, optimizer_offload="static").iteration > 2 + time_of(**full).iteration
    packed = time_of(packing_buffer_size=9, decoder_seq_length=4096, global_batch_size=32)
    assert packed.samples == pytest.approx(usual.samples, rel=0.1)


def test_cards_by_the_names_that_torch_gives():
    assert find_card("NVIDIA H200") == CARDS["H200"]
    assert find_card("NVIDIA A100-SXM4-80GB") == CARDS["A100"]
    assert find_card("NVIDIA H20") is None
