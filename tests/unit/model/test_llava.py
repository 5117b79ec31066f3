"""transformers' LLaVA is the judge of ours: the same weights give the same logits and the same loss."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.enums import AttnBackend
from transformers import LlavaForConditionalGeneration

from megatron_patch.config.train import Parallel
from megatron_patch.data.images import normalize
from megatron_patch.data.preprocessor import read_image_settings
from megatron_patch.families.llava import read_config
from megatron_patch.model import llava as llava_module
from megatron_patch.model.llava import LlavaModel
from megatron_patch.training.batch import place_images, place_labels, shard_sequence
from megatron_patch.training.loop import load_pretrained
from tests import tiny_runs


def build(mcore, tmp_path, **changed):
    config = tiny_runs.config(mcore, tmp_path, **changed)
    model = LlavaModel(config, read_config(mcore))
    load_pretrained(config, read_config(mcore), model)
    return model.eval()


def pictures(mcore, batch):
    settings = read_image_settings(mcore)
    return normalize(batch.pixels, settings.mean, settings.std, torch.float32)


def text_inputs(batch, llava, *, labels: bool) -> dict[str, torch.Tensor]:
    text = shard_sequence(batch, llava.image_token_id, Parallel())
    return place_images(text, Parallel()) | (place_labels(text) if labels else {})


def hf_logits(hf, mcore, batch):
    """[b, s, vocabulary] without the rows that the export appends."""
    judge = LlavaForConditionalGeneration.from_pretrained(hf).eval()
    # Right-padded texts: as a processor gives them, with a mask that ends with the text.
    lengths = 1 + (batch.labels != -100).float().cumsum(1).argmax(1)
    mask = torch.arange(batch.input_ids.shape[1]) < lengths.unsqueeze(1)
    with torch.no_grad():
        logits = judge(
            input_ids=batch.input_ids, pixel_values=pictures(mcore, batch), attention_mask=mask.long()
        ).logits
    return logits[..., : read_config(mcore).language.vocab_size], mask


@pytest.mark.parametrize("flash", [True, False])
def test_logits_and_loss_equal_transformers(mcore, hf, one_process, tmp_path, flash):
    """Grouped queries, an explicit head_dim, two images, right-padded texts, a vocabulary that is padded."""
    llava = read_config(mcore)
    model = build(mcore, tmp_path, use_flash_attn=flash)
    (batch,) = tiny_runs.batches(llava, 1)
    expected, mask = hf_logits(hf, mcore, batch)
    with torch.no_grad():
        logits = model(pixel_values=pictures(mcore, batch), **text_inputs(batch, llava, labels=False))
        losses = model(pixel_values=pictures(mcore, batch), **text_inputs(batch, llava, labels=True))

    assert logits.shape[-1] == llava.language.padded_vocab_size(1) > llava.language.vocab_size
    assert torch.isneginf(logits[..., llava.language.vocab_size :]).all()
    difference = (logits[..., : llava.language.vocab_size] - expected)[mask].abs().max()
    assert difference <= 1e-5
    is_label = batch.labels != -100
    assert losses.shape == (is_label.sum(),)
    assert abs(losses.mean() - F.cross_entropy(expected[is_label], batch.labels[is_label])) <= 1e-5


@pytest.fixture
def engine(monkeypatch) -> mock.Mock:
    """Stand-ins for Transformer Engine's rotations, which need a GPU, as if its layers were used."""
    monkeypatch.setattr(llava_module, "uses_transformer_engine", lambda model: True)
    engine = mock.Mock()
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", engine.rotate)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", engine.rotate_packed)
    return engine


@pytest.mark.parametrize(("flash", "backend"), [(True, AttnBackend.auto), (False, AttnBackend.unfused)])
def test_transformer_engine_is_told_which_attention(mcore, tmp_path, engine, flash, backend):
    config, llava = tiny_runs.config(mcore, tmp_path, use_flash_attn=flash), read_config(mcore)
    assert llava_module.language_config(config, llava.language).attention_backend == backend
    assert llava_module.vision_config(config, llava.vision).attention_backend == backend


def test_transformer_engine_rotates_with_its_own_kernels(mcore, tmp_path, engine):
    """Packed samples too: their borders, which are on the device, are not looked at."""
    config, llava = tiny_runs.config(mcore, tmp_path), read_config(mcore)
    query, angles, borders = torch.zeros(4, 1, 2, 8), torch.zeros(4, 1, 1, 8), mock.Mock(spec=[])
    group = mock.Mock(**{"rank.return_value": 1, "size.return_value": 2})
    settings = llava_module.language_config(config, llava.language)
    rope_utils.apply_rotary_pos_emb(query, angles, settings, cp_group=group)
    rope_utils.apply_rotary_pos_emb(query, angles, settings, borders, cp_group=group)
    engine.rotate.assert_called_once_with(query, angles, interleaved=False)
    engine.rotate_packed.assert_called_once_with(query, borders, angles, cp_size=2, cp_rank=1)
    assert not llava_module.vision_config(config, llava.vision).apply_rope_fusion


def test_local_layers_rotate_without_transformer_engine(mcore, tmp_path):
    config, llava = tiny_runs.config(mcore, tmp_path), read_config(mcore)
    assert not llava_module.language_config(config, llava.language).apply_rope_fusion


def test_text_without_pictures_trains(mcore, one_process, tmp_path):
    """Everything but the projector frozen: there is a gradient to reduce all the same, and it is zero."""
    model = build(mcore, tmp_path, freeze_lm=True, freeze_vit=True)
    ids = torch.randint(5, 300, (2, 16))
    nowhere, everywhere = torch.empty(0, dtype=torch.int64), torch.arange(ids.numel())
    losses = model(ids, nowhere, torch.zeros(0, 3, 28, 28), ids.transpose(0, 1).flatten(), wanted=everywhere)
    losses.sum().backward()
    gradients = [parameter.grad for parameter in model.vision_projection.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_frozen_parts_have_no_gradients(mcore, one_process, tmp_path):
    llava = read_config(mcore)
    model = build(mcore, tmp_path, freeze_lm=True, freeze_vit=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"vision_projection.encoder.linear_fc{i}.{what}" for i in (1, 2) for what in ("weight", "bias")}
    (batch,) = tiny_runs.batches(llava, 1)
    model(pixel_values=pictures(mcore, batch), **text_inputs(batch, llava, labels=True)).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == trained


@pytest.mark.parametrize("name", ["inference_context", "runtime_gather_output"])
def test_a_call_that_would_change_logits_is_refused(mcore, one_process, tmp_path, name):
    """megatron.core's output layer would gather, or give the last position's logits alone; this one does neither."""
    model = build(mcore, tmp_path)
    with pytest.raises(ValueError, match=f"{name}: not supported"):
        model.language_model._postprocess(torch.zeros(4, 1, 8), labels=None, loss_mask=None, **{name: True})
