"""Sizes that do not fit are refused in words, before anything is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_patch.config.train import Data, Parallel
from megatron_patch.families.clip import CLIP
from megatron_patch.families.mistral import MISTRAL
from megatron_patch.families.sizes import LanguageModel, Llava, VisionModel
from tests.tiny_runs import config

MISTRAL_7B = LanguageModel(
    family=MISTRAL,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    layernorm_epsilon=1e-5,
    vocab_size=32768,
    rotary_base=1e6,
    max_position_embeddings=32768,
)
CLIP_L_336 = VisionModel(
    family=CLIP,
    num_layers=23,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    layernorm_epsilon=1e-5,
    patch_dim=14,
    img_size=336,
)
LLAVA = Llava(language=MISTRAL_7B, vision=CLIP_L_336, image_token_id=32768)


def test_an_iteration_is_described_by_what_is_beside_it(mcore, tmp_path):
    assert config(mcore / "release", tmp_path).model.description == mcore
    assert config(mcore, tmp_path).model.description == mcore


def test_sizes_of_mistral_7b():
    assert MISTRAL_7B.num_parameters == 7_248_023_552  # what transformers counts
    assert CLIP_L_336.num_image_tokens == 576
    assert MISTRAL_7B.padded_vocab_size(4) == 32768
    assert replace(MISTRAL_7B, vocab_size=32001).padded_vocab_size(4) == 32256


@pytest.mark.parametrize("size", ["7B", "7b", "7.2B", "7248M", "auto"])
def test_model_size_fits(size):
    LLAVA.check_model_size(size)


@pytest.mark.parametrize(
    ("size", "said"), [("13B", "describes 7.2B parameters"), ("big", "expected a size such as 7B")]
)
def test_model_size_does_not_fit(size, said):
    with pytest.raises(ValueError, match=said):
        LLAVA.check_model_size(size)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"tensor_model_parallel_size": 3}, "32 attention heads, which 3 does not divide; use 1, 2, 4 or 8"),
        ({"tensor_model_parallel_size": 16}, "8 query groups, which 16 does not divide"),
        (
            {"pipeline_model_parallel_size": 8, "virtual_pipeline_model_parallel_size": 3},
            "a stage has 4 layers, which 3 does not divide; use 1, 2 or 4",
        ),
        ({"pipeline_model_parallel_size": 5}, "32 layers, which 5 does not divide; use 1, 2, 4, 8, 16 or 32"),
    ],
)
def test_parallel_sizes_do_not_fit(sizes, said):
    with pytest.raises(ValueError, match=said):
        Parallel(**sizes).check(LLAVA)


def test_batch_sizes():
    data = Data(data_path=Path("data"), micro_batch_size=2, global_batch_size=24)
    cut = Parallel(tensor_model_parallel_size=2)
    assert data.num_micro_batches(cut, world_size=8) == 3
    with pytest.raises(ValueError, match=r"not a multiple of micro batch 2 x 5 data-parallel ranks = 10; use 30"):
        data.num_micro_batches(cut, world_size=10)
    with pytest.raises(ValueError, match="7 processes: TP 2 x PP 1 x CP 1 needs a multiple of 2"):
        data.num_micro_batches(cut, world_size=7)


def test_interleaved_pipeline_needs_rounds_of_micro_batches():
    data = Data(data_path=Path("data"), micro_batch_size=1, global_batch_size=6)
    cut = Parallel(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(
        ValueError, match="6 micro batches, and the interleaved pipeline needs a multiple of its 4 stages"
    ):
        data.num_micro_batches(cut, world_size=4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seq_length": 256}, "336 pixels in patches of 14 takes 576 positions; use 576"),
        ({"decoder_seq_length": 576}, "an image alone takes 576 positions"),
        ({"decoder_seq_length": 40000}, "knows 32768 positions"),
    ],
)
def test_sequence_lengths_do_not_fit(changed, said):
    with pytest.raises(ValueError, match=said):
        config(Path("weights"), Path("out"), **{"decoder_seq_length": 1024, **changed}).check(LLAVA)


@pytest.mark.parametrize(
    ("method", "count", "said"),
    [
        (None, 3, "a stage has 8 layers, which 3 does not divide; use 1, 2, 4 or 8"),
        ("block", 9, "a stage has 8 layers; use 1 to 8"),
    ],
)
def test_layers_to_recompute_do_not_fit(method, count, said):
    cut = Parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    settings = {"decoder_seq_length": 1024, "recompute": "full", "recompute_method": method}
    config(Path("weights"), Path("out"), parallel=cut, **settings, recompute_num_layers=8).check(LLAVA)
    with pytest.raises(ValueError, match=said):
        config(Path("weights"), Path("out"), parallel=cut, **settings, recompute_num_layers=count).check(LLAVA)


def test_past_the_sliding_window_is_refused():
    llava = replace(LLAVA, language=replace(MISTRAL_7B, sliding_window=1024))
    config(Path("weights"), Path("out"), decoder_seq_length=1024).check(llava)
    with pytest.raises(ValueError, match="sliding window is 1024"):
        config(Path("weights"), Path("out"), decoder_seq_length=1025).check(llava)


def test_random_weights_stay_frozen_only_where_nothing_is_learned():
    random = {"pretrained_checkpoint": None, "model_config": Path("description"), "decoder_seq_length": 1024}

    def check(**changed):
        config(Path("weights"), Path("out"), **random, **changed).check(LLAVA)

    check()
    for frozen in ("freeze_lm", "freeze_vit"):
        with pytest.raises(ValueError, match=r"new weights are random .* or --data-path mock to measure speed"):
            check(**{frozen: True})
        with pytest.raises(ValueError, match="new weights are random"):
            check(**{frozen: True}, valid_data_path=Path("mock"))
        check(**{frozen: True}, data_path=Path("mock"))
        check(**{frozen: True}, plan=True)
