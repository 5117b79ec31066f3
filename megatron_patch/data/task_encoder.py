"""From an energon sample to a micro batch: tokens, labels, pixels. Knows neither shards nor ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.energon import InterleavedSample, Sample, SampleDecoder, SkipSample, TaskEncoder, edataclass, stateless
from megatron.energon.flavors import PinMemoryMixin
from torch import Tensor
from webdataset.autodecode import Decoder

from megatron_patch.config.train import Config
from megatron_patch.data import conversation
from megatron_patch.data.images import load_pixels
from megatron_patch.data.preprocessor import check_crop, read_image_settings
from megatron_patch.data.prompts import IMAGE, MARKED_IMAGE, Piece, document_pieces, find_format, prompt_format
from megatron_patch.data.tokenize import IGNORE, encode, load_tokenizer
from megatron_patch.families.sizes import Llava
from megatron_patch.files.text import printable

MULTIPLE = 8
"""Batches are padded to a multiple of this many positions."""
MAX_KEY = 200
"""Characters of a key that are shown: names of files in a dataset may hold anything."""
PADDING = 0
"""Id of padding. Any id will do: padding is on the right of causal sequences and has no labels."""


@edataclass
class EncodedText(Sample):
    """One sample whose images are not decoded yet: small enough for many to wait until they are packed."""

    input_ids: Tensor
    """int64 [s], each image as its number of placeholder ids."""
    labels: Tensor
    """int64 [s], already shifted: the id that follows, -100 where there is no label."""
    images: list[bytes]
    """Encoded, in the order of their placeholders."""
    num_truncated: int
    """Positions that were left out at the end, since the sample was longer than allowed."""


@edataclass
class EncodedSample(Sample):
    """One sample as the model takes it."""

    input_ids: Tensor
    """int64 [s]."""
    labels: Tensor
    """int64 [s]."""
    pixels: Tensor
    """uint8 [n, 3, h, w], images in the order of their placeholders; n may be 0."""
    num_truncated: int
    """As above."""


@edataclass
class Pack(Sample):
    """Samples that share one sequence."""

    samples: list[EncodedSample]


@edataclass
class Batch(PinMemoryMixin):
    """A micro batch: samples padded on the right to the longest and to a multiple of 8, or one packed sequence."""

    keys: list[str]
    """The samples' keys in the dataset."""
    input_ids: Tensor
    """int64 [b, s]."""
    labels: Tensor
    """int64 [b, s], already shifted; -100 is ignored."""
    pixels: Tensor
    """uint8 [n, 3, h, w], the batch's images in the order of their placeholders; n may be 0."""
    num_truncated: int = 0
    """Samples that were truncated, since they were longer than allowed."""
    segment_lengths: list[int] | None = None
    """Of a packed sequence [1, s]: the positions of each sample with its padding, s in all. None: a sample per row."""

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple]:
        """Token ids go to another process by value: torch passes each tensor as a file, in most of a millisecond."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _rebuild, (values | {name: values[name].numpy() for name in BY_VALUE},)


BY_VALUE = ("input_ids", "labels")
"""Of a batch: few bytes."""


def _rebuild(values: dict[str, Any]) -> Batch:
    """What `Batch.__reduce__` took apart."""
    tensors: dict[str, Any] = {name: torch.from_numpy(values[name]) for name in BY_VALUE}
    return Batch(**(values | tensors))


def _parse(extension: str, data: bytes) -> Any:
    if extension.endswith(".json"):
        return json.loads(data)
    return data.decode() if extension.endswith(".txt") else data


class BytesDecoder(SampleDecoder):
    """Parses json and text and leaves images as bytes: decoding them is the encoder's part, where it is guarded."""

    def __init__(self) -> None:
        super().__init__()
        self._parser = Decoder([], pre=[], post=[_parse])

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A sample's entries, by their extensions."""
        return self._parser(sample)

    def config(self) -> dict[str, Any]:
        """What energon writes down of a decoder."""
        return {"image_decode": "bytes"}


class LlavaTaskEncoder(TaskEncoder[Sample, EncodedSample, Batch, Batch]):
    """Encodes samples of the types that `conversation` reads, for the LLaVA that `config` trains."""

    decoder = BytesDecoder()
    cookers = conversation.COOKERS

    def __init__(self, config: Config, llava: Llava) -> None:
        """Reads tokenizer and image settings of the description folder. Raises ValueError where they do not fit."""
        folder = config.model.description
        self.llava = llava
        self.max_length = config.model.decoder_seq_length
        self.segment_multiple = config.parallel.sequence_multiple
        self.image_settings = read_image_settings(folder, config.data.image_transform)
        self.tokenizer = load_tokenizer(folder)
        self.format_name = find_format(config.data.prompt_format, folder, llava.language.family.name, self.tokenizer)
        self.prompt = prompt_format(self.format_name, self.tokenizer)
        self.image_text = MARKED_IMAGE if config.data.use_im_start_end else IMAGE
        self._check(folder)

    @stateless
    def preencode_sample(self, sample: Sample) -> EncodedText:
        """Everything but the images. Raises ValueError that names the sample's key when it cannot be trained on."""
        try:
            pieces, images = self._pieces(sample)
            encoded = encode(
                pieces,
                self.tokenizer,
                image_token_id=self.llava.image_token_id,
                num_image_tokens=self.llava.vision.num_image_tokens,
                max_length=self.max_length,
            )
        except ValueError as error:
            raise ValueError(f"sample {sample.__key__}: {error}") from error
        return EncodedText.derive_from(
            sample,
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            # An image after the last position is not needed.
            images=images[: encoded.num_images],
            num_truncated=encoded.num_truncated,
        )

    @stateless
    def postencode_sample(self, sample: EncodedText) -> EncodedSample:
        """The images. Raises ValueError that names the sample's key when one cannot be read."""
        try:
            pixels = [load_pixels(image, self.image_settings) for image in sample.images]
        except ValueError as error:
            raise ValueError(f"sample {sample.__key__}: {error}") from error
        nothing = torch.empty((0, 3, *self.image_settings.crop_size), dtype=torch.uint8)
        return EncodedSample.derive_from(
            sample,
            input_ids=sample.input_ids,
            labels=sample.labels,
            pixels=torch.stack(pixels) if pixels else nothing,
            num_truncated=sample.num_truncated,
        )

    @stateless
    def select_samples_to_pack(self, samples: list[EncodedText]) -> list[list[EncodedText]]:
        """Best fit, longest first, into sequences of at most `max_length` positions.

        Both the packs and their samples keep the order in which they came, since that is the shuffled one.
        """
        lengths = [self.segment_length(sample) for sample in samples]
        packs: list[list[int]] = []
        rooms: list[int] = []
        for index in sorted(range(len(samples)), key=lambda index: -lengths[index]):
            fitting = [pack for pack, room in enumerate(rooms) if room >= lengths[index]]
            if fitting:
                pack = min(fitting, key=rooms.__getitem__)
                packs[pack].append(index)
                rooms[pack] -= lengths[index]
            else:
                packs.append([index])
                rooms.append(self.max_length - lengths[index])
        return [[samples[index] for index in pack] for pack in sorted(map(sorted, packs))]

    @stateless
    def pack_selected_samples(self, samples: list[EncodedSample]) -> Pack:
        """Raises SkipSample when none of them could be read."""
        if not samples:
            raise SkipSample
        return Pack.derive_from(samples[0], samples=samples)

    @stateless
    def batch(self, samples: list[Any]) -> Batch:
        """Pad and stack several `EncodedSample`, or put those of one `Pack` one after the other."""
        if isinstance(samples[0], Pack):
            (pack,) = samples
            return pack_samples(pack.samples, self.segment_multiple)
        longest = max(len(sample.input_ids) for sample in samples)
        length = min(_round_up(longest, MULTIPLE), self.max_length)
        return _batch(samples, [length] * len(samples), packed=False)

    def segment_length(self, sample: EncodedText | EncodedSample) -> int:
        """Positions of a sample in a packed sequence: with the padding that context- and tensor-parallel ranks need."""
        return _round_up(len(sample.input_ids), self.segment_multiple)

    def _pieces(self, sample: Sample) -> tuple[Iterator[Piece], list[bytes]]:
        """A sample's text, split where its labels begin and end, and its encoded images."""
        said = conversation.read(sample)
        if isinstance(said, InterleavedSample):
            sequence: list[Any] = said.sequence  # images as bytes, which is how `BytesDecoder` leaves them
            pieces = document_pieces(sequence, self.tokenizer)
            images = [part for part in sequence if isinstance(part, bytes)]
        else:
            pieces, images = self.prompt.pieces(said.turns), said.pictures
        return ((text.replace(IMAGE, self.image_text), is_labelled) for text, is_labelled in pieces), images

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
        check_crop(folder, self.image_settings, self.llava.vision.img_size)


def pack_samples(samples: list[EncodedSample], multiple: int) -> Batch:
    """The samples one after the other, each padded to a multiple of `multiple`, and the last to one of 8 too."""
    lengths = [_round_up(len(sample.input_ids), multiple) for sample in samples]
    lengths[-1] += -sum(lengths) % math.lcm(MULTIPLE, multiple)
    return _batch(samples, lengths, packed=True)


def _batch(samples: list[EncodedSample], lengths: list[int], *, packed: bool) -> Batch:
    """The samples, padded on the right to `lengths` (all the same, unless packed)."""
    join = (lambda rows: torch.cat(rows)[None]) if packed else torch.stack
    pairs = list(zip(samples, lengths, strict=True))
    return Batch(
        keys=[printable(sample.__key__, MAX_KEY) for sample in samples],
        input_ids=join([_pad(sample.input_ids, length, PADDING) for sample, length in pairs]),
        labels=join([_pad(sample.labels, length, IGNORE) for sample, length in pairs]),
        pixels=torch.cat([sample.pixels for sample in samples]),
        num_truncated=sum(sample.num_truncated > 0 for sample in samples),
        segment_lengths=lengths if packed else None,
    )


def _pad(row: Tensor, length: int, value: int) -> Tensor:
    return F.pad(row, (0, length - len(row)), value=value)


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple
