"""From an energon sample to a micro batch: tokens, labels, pixels. Knows neither shards nor ranks."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from megatron.energon import InterleavedSample, Sample, SampleDecoder, TaskEncoder, edataclass, stateless
from megatron.energon.flavors import PinMemoryMixin
from torch import Tensor
from webdataset.autodecode import Decoder

from megatron_patch.config import Config
from megatron_patch.data import conversation
from megatron_patch.data.image import load_pixels, read_image_settings
from megatron_patch.data.prompts import IMAGE, MARKED_IMAGE, Piece, document_pieces, find_format, prompt_format
from megatron_patch.data.tokenize import IGNORE, encode, load_tokenizer
from megatron_patch.sizes import Llava

logger = logging.getLogger(__name__)

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
    num_cut: int
    """Positions that were left out at the end, since the sample was longer than allowed."""


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
    num_cut: int = 0
    """Samples that were cut at their end, since they were longer than allowed."""


def _parse(extension: str, data: bytes) -> Any:
    if extension.endswith(".json"):
        return json.loads(data)
    return data.decode() if extension.endswith(".txt") else data


class BytesDecoder(SampleDecoder):
    """Parses json and text and leaves pictures as bytes: decoding them is the encoder's part, where it is guarded."""

    def __init__(self) -> None:
        self._config = {"image_decode": "bytes"}
        self._decoder = Decoder([], pre=[], post=[_parse])


class LlavaTaskEncoder(TaskEncoder[Sample, EncodedSample, Batch, Batch]):
    """Encodes samples of the types that `conversation` reads, for the LLaVA that `config` trains."""

    decoder = BytesDecoder()
    cookers = conversation.COOKERS

    def __init__(self, config: Config, llava: Llava) -> None:
        """Reads tokenizer and image settings of the description folder. Raises ValueError where they do not fit."""
        folder = config.model.description
        self.llava = llava
        self.max_length = config.model.decoder_seq_length
        self.image_settings = read_image_settings(folder, config.data.image_transform)
        self.tokenizer = load_tokenizer(folder)
        self.format_name = find_format(config.data.prompt_format, folder, llava.language.family)
        self.prompt = prompt_format(self.format_name, self.tokenizer)
        self.image_text = MARKED_IMAGE if config.data.use_im_start_end else IMAGE
        self._check(folder)

    @stateless
    def encode_sample(self, sample: Sample) -> EncodedSample:
        """Raises ValueError that names the sample's key when it cannot be trained on."""
        try:
            return self._encode(sample)
        except ValueError as error:
            raise ValueError(f"sample {sample.__key__}: {error}") from error

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
            num_cut=sum(sample.num_cut > 0 for sample in samples),
        )

    def _encode(self, sample: Sample) -> EncodedSample:
        pieces, pictures = self._pieces(sample)
        encoded = encode(
            pieces,
            self.tokenizer,
            image_token_id=self.llava.image_token_id,
            num_image_tokens=self.llava.vision.num_image_tokens,
            max_length=self.max_length,
        )
        if encoded.num_cut:
            logger.info(f"sample {sample.__key__}: cut by {encoded.num_cut} to {len(encoded.input_ids)} positions")
        # A picture behind the last position is not needed.
        pixels = [load_pixels(picture, self.image_settings) for picture in pictures[: encoded.num_images]]
        nothing = torch.empty((0, 3, *self.image_settings.crop_size), dtype=torch.uint8)
        return EncodedSample.derive_from(
            sample,
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            pixels=torch.stack(pixels) if pixels else nothing,
            num_cut=encoded.num_cut,
        )

    def _pieces(self, sample: Sample) -> tuple[list[Piece], list[bytes]]:
        """A sample's text, cut where learned and given text meet, and its encoded pictures."""
        said = conversation.read(sample)
        if isinstance(said, InterleavedSample):
            pieces = document_pieces(said.sequence, self.tokenizer)
            pictures = [part for part in said.sequence if isinstance(part, bytes)]
        else:
            pieces, pictures = self.prompt.pieces(said.turns), said.pictures
        return [(text.replace(IMAGE, self.image_text), is_learned) for text, is_learned in pieces], pictures

    def _check(self, folder: Path) -> None:
        expected = self.tokenizer.convert_tokens_to_ids(IMAGE)
        if expected != self.llava.image_token_id:
            raise ValueError(
                f"{folder}: {IMAGE} is {expected} in the tokenizer and {self.llava.image_token_id} in config.json; "
                f"expected a folder that the converter wrote"
            )
        if len(self.tokenizer(self.image_text, add_special_tokens=False).input_ids) != self.image_text.count("<"):
            raise ValueError(
                f"--use-im-start-end true: {folder} has no tokens <im_start> and <im_end>; convert the model with "
                f"--add-tokens neva, or use false"
            )
        size = self.llava.vision.img_size
        if self.image_settings.crop_size != (size, size):
            raise ValueError(
                f"{folder}/preprocessor_config.json: crop_size is {self.image_settings.crop_size}, but the vision "
                f"tower takes {size} x {size} pixels; use the tower's own preprocessor_config.json"
            )


def _pad(rows: list[Tensor], length: int, value: int) -> Tensor:
    """[s_i] each -> [b, length], filled up on the right."""
    padded = torch.full((len(rows), length), value)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
