"""From an energon sample to a micro batch: tokens, labels, pixels. Knows neither shards nor ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from megatron.energon import Sample, SampleDecoder, TaskEncoder, VQASample, edataclass, stateless
from megatron.energon.flavors import PinMemoryMixin
from torch import Tensor
from webdataset.autodecode import Decoder

from megatron_patch.config import Config
from megatron_patch.data.image import load_pixels, read_image_settings
from megatron_patch.data.tokenize import IGNORE, IMAGE, encode, format_name, load_tokenizer, prompt_format
from megatron_patch.sizes import Llava

MULTIPLE = 8
"""Batches are padded to a multiple of this many positions."""
PADDING = 0
"""Id of padding. Any word will do: it stands on the right of causal sequences and is never learned."""


@edataclass
class EncodedSample(Sample):
    """One sample as the model takes it."""

    input_ids: Tensor
    """int64 [s], each picture as its number of placeholder ids."""
    labels: Tensor
    """int64 [s], already shifted: the id that follows, -100 where nothing is learned."""
    pixels: Tensor
    """uint8 [n, 3, h, w], pictures in the order of their placeholders; n may be 0."""


@edataclass
class Batch(PinMemoryMixin):
    """A micro batch, padded on the right to its longest sample, rounded up to a multiple of 8."""

    keys: list[str]
    """The samples' keys in the dataset."""
    input_ids: Tensor
    """int64 [b, s]."""
    labels: Tensor
    """int64 [b, s], already shifted; -100 is ignored."""
    pixels: Tensor
    """uint8 [n, 3, h, w], the batch's pictures in the order of their placeholders; n may be 0."""


def _parse(extension: str, data: bytes) -> Any:
    if extension.endswith(".json"):
        return json.loads(data)
    return data.decode() if extension.endswith(".txt") else data


class BytesDecoder(SampleDecoder):
    """Parses json and text and leaves pictures as bytes: decoding them is the encoder's part, where it is guarded."""

    def __init__(self) -> None:
        self._config = {"image_decode": "bytes"}
        self._decoder = Decoder([], pre=[], post=[_parse])


class LlavaTaskEncoder(TaskEncoder[VQASample, EncodedSample, Batch, Batch]):
    """Encodes a VQASample (image, context with its `<image>`, answers) for the LLaVA that `config` trains."""

    decoder = BytesDecoder()

    def __init__(self, config: Config, llava: Llava) -> None:
        """Reads tokenizer and image settings of the description folder. Raises ValueError where they do not fit."""
        folder = config.model.description
        self.llava = llava
        self.max_length = config.model.decoder_seq_length
        self.image_settings = read_image_settings(folder)
        self.tokenizer = load_tokenizer(folder)
        self.format_name = format_name(config.data.prompt_format, llava.language.family)
        self.style = prompt_format(self.format_name, self.tokenizer)
        self._check(folder)

    @stateless
    def encode_sample(self, sample: VQASample) -> EncodedSample:
        """Raises ValueError that names the sample's key when it cannot be trained on."""
        try:
            pictures = [] if sample.image is None else [sample.image]
            input_ids, labels, pixels = self._encode(sample.context, _only(sample.answers), pictures)
        except ValueError as error:
            raise ValueError(f"sample {sample.__key__}: {error}") from error
        return EncodedSample.derive_from(sample, input_ids=input_ids, labels=labels, pixels=pixels)

    @stateless
    def batch(self, samples: list[EncodedSample]) -> Batch:
        """Pad and stack."""
        longest = max(len(sample.input_ids) for sample in samples)
        length = min(math.ceil(longest / MULTIPLE) * MULTIPLE, self.max_length)
        return Batch(
            keys=[sample.__key__ for sample in samples],
            input_ids=_pad([sample.input_ids for sample in samples], length, PADDING),
            labels=_pad([sample.labels for sample in samples], length, IGNORE),
            pixels=torch.cat([sample.pixels for sample in samples]),
        )

    def _encode(self, context: str, answer: str, pictures: list[bytes]) -> tuple[Tensor, Tensor, Tensor]:
        asked, answered = context.count(IMAGE), answer.count(IMAGE)
        if asked != len(pictures) or answered:
            raise ValueError(
                f"context has {asked} {IMAGE} and answer {answered}, expected {len(pictures)} and 0, one per picture"
            )
        if not answer.strip():
            raise ValueError("the answer is empty")
        input_ids, labels, num_images = encode(
            [(context, answer)],
            self.tokenizer,
            self.style,
            image_token_id=self.llava.image_token_id,
            num_image_tokens=self.llava.vision.num_image_tokens,
            max_length=self.max_length,
        )
        # A picture whose placeholders fell behind the last position is not needed.
        pixels = [load_pixels(picture, self.image_settings) for picture in pictures[:num_images]]
        nothing = torch.empty((0, 3, *self.image_settings.crop_size), dtype=torch.uint8)
        return input_ids, labels, torch.stack(pixels) if pixels else nothing

    def _check(self, folder: Path) -> None:
        expected = self.tokenizer.convert_tokens_to_ids(IMAGE)
        if expected != self.llava.image_token_id:
            raise ValueError(
                f"{folder}: {IMAGE} is {expected} in the tokenizer and {self.llava.image_token_id} in config.json; "
                f"expected a folder that the converter wrote"
            )
        size = self.llava.vision.img_size
        if self.image_settings.crop_size != (size, size):
            raise ValueError(
                f"{folder}/preprocessor_config.json: crop_size is {self.image_settings.crop_size}, but the vision "
                f"tower takes {size} x {size} pixels; use the tower's own preprocessor_config.json"
            )


def _only(answers: str | list[str] | None) -> str:
    """VQASample allows several answers; one is learned."""
    if isinstance(answers, str):
        return answers
    if not isinstance(answers, list) or len(answers) != 1 or not isinstance(answers[0], str):
        raise ValueError(f"answers is {str(answers)[:60]}, expected one text")
    return answers[0]


def _pad(rows: list[Tensor], length: int, value: int) -> Tensor:
    """[s_i] each -> [b, length], filled up on the right."""
    padded = torch.full((len(rows), length), value)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
