"""What benchmarks of training compute on: a LLaVA's description, random batches, and the run's settings."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlavaConfig, MistralConfig

from megatron_patch.config.train import Checkpoint, Config, Data, Model, Optimizer, Training
from megatron_patch.conversion.companions import preprocessor_config
from megatron_patch.data.task_encoder import MULTIPLE, PADDING, Batch
from megatron_patch.data.tokenize import IGNORE
from megatron_patch.families.llava import read_config


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a whole model."""

    language: tuple[int, int, int, int, int]
    """Hidden size, feed-forward channels, layers, heads, query groups."""
    vision: tuple[int, int, int, int]
    """The same of the tower, which has no groups."""
    vocab_size: int = 32768
    """The image token is the last."""
    image_size: int = 336
    """In pixels, of which a patch has 14."""

    @property
    def num_image_tokens(self) -> int:
        """Positions of an image."""
        return (self.image_size // PATCH) ** 2

    @property
    def longest(self) -> int:
        """A length in tokens, a multiple of 64, that every sample of these benchmarks fits in."""
        return -(-(PROMPT + self.num_image_tokens + CAPTION[1] - 1) // 64) * 64


SIZES = {
    "7B": Size(language=(4096, 14336, 32, 32, 8), vision=(1024, 4096, 24, 16)),
    "100M": Size(language=(640, 1728, 8, 10, 10), vision=(384, 1536, 12, 6)),
    "tiny": Size(language=(64, 128, 2, 4, 2), vision=(32, 64, 3, 2), vocab_size=1024, image_size=112),
}
PATCH = 14
PROMPT = 14
"""Words around a picture: the question and what marks it."""
CAPTION = (15, 45)
"""Fewest and most learned words of a caption: 30 in the mean, as in LLaVA-Pretrain."""
LEARNING_RATE = 1e-3


def machine() -> str:
    """What computes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write_description(folder: Path, size: str, num_layers: int | None = None) -> None:
    """config.json and preprocessor_config.json of a Mistral with a CLIP, in `folder`.

    `num_layers`: of the language model; None: all of them.
    """
    sizes = SIZES[size]
    hidden, ffn, layers, heads, groups = sizes.language
    vision_hidden, vision_ffn, vision_layers, vision_heads = sizes.vision
    text = MistralConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=num_layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=vision_ffn,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=sizes.image_size,
        patch_size=PATCH,
    )
    LlavaConfig(text_config=text, vision_config=vision, image_token_index=sizes.vocab_size - 1).save_pretrained(folder)
    preprocessor = preprocessor_config(read_config(folder).vision)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def make_batch(size: str, num_samples: int, seed: int, length: int | None = None) -> Batch:
    """A micro batch of samples with a random image and a random caption each.

    `size`: of the model. `length`: of the sequences, in tokens; None: padded to the longest, as in training.
    """
    sizes, generator = SIZES[size], torch.Generator().manual_seed(seed)
    image = torch.full((sizes.num_image_tokens,), sizes.vocab_size - 1)
    captions = torch.randint(CAPTION[0], CAPTION[1] + 1, (num_samples,), generator=generator).tolist()
    longest = PROMPT + len(image) + max(captions) - 1
    length = length or -(-longest // MULTIPLE) * MULTIPLE
    assert length >= longest, (length, longest)
    input_ids = torch.full((num_samples, length), PADDING)
    labels = torch.full((num_samples, length), IGNORE)
    for row, caption in enumerate(captions):
        words = torch.randint(3, sizes.vocab_size - 1, (PROMPT + caption,), generator=generator)
        text = torch.cat([words[: PROMPT // 2], image, words[PROMPT // 2 :]])
        input_ids[row, : len(text) - 1] = text[:-1]
        labels[row, len(text) - 1 - caption : len(text) - 1] = text[-caption:]
    shape = (num_samples, 3, sizes.image_size, sizes.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Batch(keys=[str(row) for row in range(num_samples)], input_ids=input_ids, labels=labels, pixels=pixels)


def make_config(
    folder: Path, freeze_lm: bool, precision: str, batches: list[Batch], freeze_vit: bool | None = None, **model: str
) -> Config:
    """What our side is told; the learning rate stays the same. `freeze_vit`: None: as the language model."""
    micro_batch_size = len(batches[0].keys)
    return Config(
        model=Model(
            model_config=folder,
            decoder_seq_length=max(batch.labels.shape[1] for batch in batches),
            precision=precision,
            freeze_lm=freeze_lm,
            freeze_vit=freeze_lm if freeze_vit is None else freeze_vit,
            **model,
        ),
        data=Data(data_path=folder, micro_batch_size=micro_batch_size, global_batch_size=micro_batch_size),
        optimizer=Optimizer(lr=LEARNING_RATE, min_lr=LEARNING_RATE),
        training=Training(train_iters=1000),
        checkpoint=Checkpoint(output=folder),
    )
