"""Configurations and batches for tests that train the tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_patch.config.train import Checkpoint, Config, Data, Model, Optimizer, Parallel, Training
from megatron_patch.data.task_encoder import Batch
from megatron_patch.families.sizes import Llava


def config(mcore: Path, output: Path, *, parallel: Parallel | None = None, **changed) -> Config:
    """Everything trained, fp32; `changed` are fields of any part but Parallel."""
    given = {
        Model: {
            "pretrained_checkpoint": mcore,
            "precision": "fp32",
            "freeze_lm": False,
            "freeze_vit": False,
            "decoder_seq_length": 128,
        },
        Data: {"data_path": output, "micro_batch_size": 2, "global_batch_size": 4, "num_workers": 0},
        Optimizer: {"lr": 2e-3},
        Training: {"train_iters": 100},
        Checkpoint: {"output": output},
    }
    for name, value in changed.items():
        (part,) = (part for part in given if name in part.__dataclass_fields__)
        given[part][name] = value
    return Config(
        parallel=parallel or Parallel(), **{part.__name__.lower(): part(**values) for part, values in given.items()}
    )


def batches(
    llava: Llava, count: int, seed: int = 0, pictures: Sequence[tuple[int, int]] = ((1, 1), (2, 0))
) -> list[Batch]:
    """Micro batches of two samples with random words and pixels, of different lengths, padded on the right.

    `images`: how many the two samples of a micro batch have, one pair after another and then from the start again.
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((llava.vision.num_image_tokens,), llava.image_token_id)
    made = []
    for index in range(count):
        texts, answers = [], []
        for row, num_images in enumerate(pictures[index % len(pictures)]):
            before, answer = 3 + row, 9 + (5 * index + 7 * row) % 11
            words = torch.randint(5, llava.language.vocab_size, (before + 2 + answer,), generator=generator)
            words[words == llava.image_token_id] = 5
            texts.append(torch.cat([words[:before], *[image] * num_images, words[before:]]))
            answers.append(answer)
        length = max(60, *map(len, texts))
        input_ids = torch.zeros(2, length, dtype=torch.int64)
        labels = torch.full((2, length), -100)
        for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            input_ids[row, : len(text) - 1] = text[:-1]
            labels[row, len(text) - 1 - answer : len(text) - 1] = text[-answer:]
        shape = (sum(pictures[index % len(pictures)]), 3, llava.vision.img_size, llava.vision.img_size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        keys = [f"{index}-{row}" for row in range(2)]
        made.append(Batch(keys=keys, input_ids=input_ids, labels=labels, pixels=pixels))
    return made
