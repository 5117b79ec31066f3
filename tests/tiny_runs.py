"""Configurations and batches for tests that train the tiny model."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_patch.config import Checkpoint, Config, Data, Model, Optimizer, Parallel, Training
from megatron_patch.data.task_encoder import Batch
from megatron_patch.sizes import Llava


def config(mcore: Path, output: Path, *, parallel: Parallel | None = None, **changed) -> Config:
    """Everything trained, fp32; `changed` are fields of Model or Training."""
    model = {"precision": "fp32", "freeze_lm": False, "freeze_vit": False, "decoder_seq_length": 128}
    training = {"train_iters": 100}
    for name, value in changed.items():
        (model if name in Model.__dataclass_fields__ else training)[name] = value
    return Config(
        model=Model(pretrained_checkpoint=mcore, **model),
        parallel=parallel or Parallel(),
        data=Data(data_path=output, micro_batch_size=2, global_batch_size=4, num_workers=0),
        optimizer=Optimizer(lr=2e-3),
        training=Training(**training),
        checkpoint=Checkpoint(output=output),
    )


def batches(llava: Llava, count: int, seed: int = 0) -> list[Batch]:
    """Micro batches of two samples, padded on the right: one picture in each, or in every other batch two and none."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((llava.vision.num_image_tokens,), llava.image_token_id)
    made = []
    for index in range(count):
        input_ids = torch.zeros(2, 60, dtype=torch.int64)
        labels = torch.full((2, 60), -100)
        for row in range(2):
            before, answer = 3 + row, 9 + (5 * index + 7 * row) % 11
            words = torch.randint(5, llava.language.vocab_size, (before + 2 + answer,), generator=generator)
            pictures = 1 if index % 2 == 0 else 2 - 2 * row
            text = torch.cat([words[:before], *pictures * [image], words[before:]])
            input_ids[row, : len(text) - 1] = text[:-1]
            labels[row, len(text) - 1 - answer : len(text) - 1] = text[-answer:]
        size = llava.vision.img_size
        pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
        keys = [f"{index}-{row}" for row in range(2)]
        made.append(Batch(keys=keys, input_ids=input_ids, labels=labels, pixels=pixels))
    return made
