"""Weight gradients that are added up by the product that makes them."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from megatron.core.tensor_parallel import layers

from megatron_patch.config.train import Parallel
from megatron_patch.data.images import normalize
from megatron_patch.families.llava import read_config
from megatron_patch.patches.gradients import add_product
from megatron_patch.training import optimizer, weight_gradients
from megatron_patch.training.batch import place_images, place_labels, shard_sequence
from megatron_patch.training.loop import build_model
from tests import tiny_runs

CPU = torch.device("cpu")


def test_what_adds_up_exactly_is_told_by_trying_it():
    assert weight_gradients.is_exact(add_product, torch.float32, CPU)
    assert not weight_gradients.is_exact(add_product, torch.bfloat16, CPU)  # torch has it for GPUs

    def in_16_bits(inputs, gradients, main_grad):
        main_grad.add_(gradients.t() @ inputs)

    def refusing(inputs, gradients, main_grad):
        raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")  # an older torch

    assert not weight_gradients.is_exact(in_16_bits, torch.bfloat16, CPU)
    assert not weight_gradients.is_exact(refusing, torch.bfloat16, CPU)

    def in_fp32(inputs, gradients, main_grad):
        main_grad.addmm_(gradients.t().float(), inputs.float())

    assert weight_gradients.is_exact(in_fp32, torch.bfloat16, CPU)


@pytest.mark.parametrize("shares", [False, True], ids=["untied", "tied"])
def test_equals_what_is_added_up_afterwards(mcore, tmp_path, one_process, monkeypatch, shares):
    """Of two micro batches, one without an image; and the layers do add up in place."""
    config = tiny_runs.config(None, tmp_path, model_config=mcore)
    llava = read_config(mcore)
    llava = replace(llava, language=replace(llava.language, share_embeddings_and_output_weights=shares))
    (chunk,) = build_model(config, llava)
    micro_batches = tiny_runs.batches(llava, 2, pictures=((1, 1), (0, 0)))
    add = mock.Mock(side_effect=add_product)
    monkeypatch.setattr(layers.fused_weight_gradient_mlp_cuda, "wgrad_gemm_accum_fp32", add)

    def gradients(fused: bool) -> dict[str, torch.Tensor]:
        (wrapped,) = optimizer.wrap([chunk], config)
        linear = [module for module in chunk.modules() if hasattr(module, "gradient_accumulation_fusion")]
        assert linear
        assert all(module.gradient_accumulation_fusion for module in linear)
        for module in linear:
            module.gradient_accumulation_fusion = fused
        add.reset_mock()
        for batch in micro_batches:
            text = shard_sequence(batch, llava.image_token_id, config.parallel)
            pixels = normalize(batch.pixels, (0.5,) * 3, (0.5,) * 3, torch.float32)
            text = {**place_images(text, config.parallel), **place_labels(text)}
            wrapped(pixel_values=pixels, **text).sum().backward()
        assert add.call_count == (len(micro_batches) * len(linear) if fused else 0)
        return {name: weight.main_grad.clone() for name, weight in chunk.named_parameters()}

    expected = gradients(fused=False)
    for name, gradient in gradients(fused=True).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6 * expected[name].abs().max().item())


def test_a_model_without_a_wrapper_has_its_gradients_as_usual(mcore, tmp_path, one_process):
    (chunk,) = build_model(tiny_runs.config(None, tmp_path, model_config=mcore), read_config(mcore))
    (batch,) = tiny_runs.batches(read_config(mcore), 1, pictures=((0, 0),))
    size = read_config(mcore).vision.img_size
    text = shard_sequence(batch, read_config(mcore).image_token_id, Parallel())
    text = {**place_images(text, Parallel()), **place_labels(text)}
    chunk(pixel_values=torch.zeros(0, 3, size, size), **text).sum().backward()
    assert all(parameter.grad is not None for parameter in chunk.parameters())


def test_transformer_engine_adds_up_by_itself():
    """A stand-in for one of its layers, which need a GPU."""
    te = torch.nn.Identity()
    te.fuse_wgrad_accumulation = False
    chunk = torch.nn.Sequential(te)
    chunk.config = mock.Mock(params_dtype=torch.bfloat16)
    weight_gradients.accumulate_in_place([chunk])
    assert te.fuse_wgrad_accumulation
