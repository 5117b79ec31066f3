"""Twenty steps of ours and of a plain PyTorch loop over transformers' LLaVA: the same weights, batches and settings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from megatron_patch.config.train import Optimizer
from megatron_patch.data.images import normalize
from megatron_patch.data.preprocessor import read_image_settings
from megatron_patch.families.llava import read_config
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.optimizer import build_scheduler
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs

STEPS = 20
SETTINGS = Optimizer(lr=1e-3, min_lr=1e-4, lr_warmup_iters=4, weight_decay=0.1, clip_grad=1.0)


def learning_rate(step: int) -> float:
    """Linear warmup, then a cosine that ends at its lowest; `step` counts from 1."""
    if step <= SETTINGS.lr_warmup_iters:
        return SETTINGS.lr * step / SETTINGS.lr_warmup_iters
    part = (step - SETTINGS.lr_warmup_iters) / (STEPS - SETTINGS.lr_warmup_iters)
    return SETTINGS.min_lr + (SETTINGS.lr - SETTINGS.min_lr) * (1 + math.cos(math.pi * part)) / 2


def plain_loop(hf, mcore, batches, freeze: bool) -> list[float]:
    """The judge: transformers' model, torch's AdamW, no weight decay for biases and norms."""
    llava, image = read_config(mcore), read_image_settings(mcore)
    model = LlavaForConditionalGeneration.from_pretrained(hf)
    if freeze:
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": SETTINGS.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(SETTINGS.adam_beta1, SETTINGS.adam_beta2), eps=SETTINGS.adam_eps)
    losses = []
    for step in range(1, STEPS + 1):
        num_labels = sum((batch.labels != -100).sum() for batch in batches)
        total = 0.0
        for batch in batches:
            pixels = normalize(batch.pixels, image.mean, image.std, torch.float32)
            logits = model(input_ids=batch.input_ids, pixel_values=pixels).logits[..., : llava.language.vocab_size]
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum") / num_labels
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("freeze", [False, True], ids=["everything", "projector"])
def test_losses_equal_transformers_for_twenty_steps(mcore, hf, tmp_path, freeze):
    llava = read_config(mcore)
    batches = tiny_runs.batches(llava, 2)
    expected = plain_loop(hf, mcore, batches, freeze)
    assert expected[-1] < expected[0] - (0.1 if freeze else 1)

    config = tiny_runs.config(mcore, tmp_path, train_iters=STEPS, freeze_lm=freeze, freeze_vit=freeze)
    config = replace(config, optimizer=SETTINGS)
    _, wrapped, optimizer, _ = start_or_resume(config, llava)
    scheduler, run = build_scheduler(optimizer, config, 0), batch_runner(config, llava)
    losses = []
    for _ in range(STEPS):
        scheduler.step(1)
        losses.append(train_step(wrapped, optimizer, iter(batches), run).totals.loss)
    assert losses == pytest.approx(expected, abs=1e-4)
