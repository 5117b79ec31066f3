"""What energon's samples say: questions and answers with images in them, or a document of text and images.

A data set of another kind needs no code here: energon's `sample_loader` in its dataset.yaml makes a `Conversation` of
what lies in its shards (see docs/formats.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron.energon import (
    CaptioningSample,
    Cooker,
    CrudeSample,
    InterleavedSample,
    Sample,
    SimilarityInterleavedSample,
    VQASample,
    basic_sample_keys,
    edataclass,
    stateless,
)

from megatron_patch.data.prompts import IMAGE, Turn, pair_turns

IMAGE_FILE = re.compile(r"(?:(\d+)\.)?(?:jpe?g|png|webp|gif|bmp|tiff?)")
"""Fields of a shard that hold an image: `jpg`, then `1.jpg`, `2.jpg`, ..."""


@edataclass
class Conversation(Sample):
    """Questions and answers, and the images that their `<image>` stand for."""

    turns: list[Turn]
    """(question, answer) each."""
    pictures: list[bytes]
    """Encoded, in the order of their `<image>`."""


def read(sample: Sample) -> Conversation | InterleavedSample:
    """What a sample of any known type says. Raises ValueError when it cannot be trained on."""
    for kind, reader in READERS.items():
        if isinstance(sample, kind):
            said = reader(sample)
            break
    else:
        known = ", ".join(kind.__name__ for kind in READERS if kind is not Conversation)
        raise ValueError(
            f"samples of type {type(sample).__name__} are not known; in dataset.yaml use {known}, CrudeWebdataset, or "
            f"megatron_patch.data.conversation.Conversation with a sample_loader of your own"
        )
    _check(said)
    return said


@stateless
def cook(sample: CrudeSample) -> Conversation:
    """A crude sample: `json`, a list of {"from", "value"} turns, and its images `jpg`, `1.jpg`, `2.jpg`, ..."""
    numbered = {}
    for name, data in sample.items():
        if (match := IMAGE_FILE.fullmatch(name)) is not None:
            numbered[int(match[1] or 0)] = data
    images = [numbered[number] for number in sorted(numbered)]
    return Conversation(**basic_sample_keys(sample), turns=pair_turns(sample.get("json")), pictures=images)


COOKERS = [Cooker(cook)]
"""For datasets whose dataset.yaml says CrudeWebdataset."""


def _vqa(sample: VQASample) -> Conversation:
    images = [] if sample.image is None else [sample.image]
    return Conversation.derive_from(sample, turns=[(sample.context, _only(sample.answers))], pictures=images)


def _captioning(sample: CaptioningSample) -> Conversation:
    return Conversation.derive_from(sample, turns=[(IMAGE, sample.caption)], pictures=[sample.image])


def _similarity(sample: SimilarityInterleavedSample) -> Conversation | InterleavedSample:
    """Turns as Megatron-LM's examples/multimodal stores them, or MMC4's texts with the images that belong to each.

    Each image goes before the text that it is matched to (arXiv:2304.06939).
    """
    if any(isinstance(text, dict) for text in sample.texts):
        return Conversation.derive_from(sample, turns=pair_turns(sample.texts), pictures=list(sample.images))
    places = sample.matched_text_indices
    if places is None and sample.similarity_matrix is not None:
        places = sample.similarity_matrix.argmax(dim=1).tolist()  # [images, texts]
    if places is None or len(places) != len(sample.images):
        raise ValueError(
            f"{len(sample.images)} images and {'no' if places is None else len(places)} places for them; expected "
            f"matched_text_indices or a similarity_matrix with one row per image"
        )
    outside = [place for place in places if not 0 <= place < len(sample.texts)]
    if outside:
        raise ValueError(f"an image's place is {outside[0]}, expected 0 to {len(sample.texts) - 1}, a text's number")
    sequence: list[Any] = []
    for index, text in enumerate(sample.texts):
        sequence += [image for image, place in zip(sample.images, places, strict=True) if place == index]
        # MMC4's texts are sentences.
        sequence.append(f" {text}" if sequence and isinstance(sequence[-1], str) else text)
    return InterleavedSample.derive_from(sample, sequence=sequence)


READERS: dict[type[Sample], Callable[[Any], Conversation | InterleavedSample]] = {
    Conversation: lambda sample: sample,
    VQASample: _vqa,
    CaptioningSample: _captioning,
    InterleavedSample: lambda sample: sample,
    SimilarityInterleavedSample: _similarity,
}
"""From energon's types to the two that are encoded."""


def _only(answers: str | list[str] | None) -> str:
    """VQASample allows several answers; one is labelled."""
    if isinstance(answers, str):
        return answers
    if not isinstance(answers, list) or len(answers) != 1 or not isinstance(answers[0], str):
        raise ValueError(f"answers is {str(answers)[:60]}, expected one text")
    return answers[0]


def _check(said: Conversation | InterleavedSample) -> None:
    """Every `<image>` in a question has its image, and nothing else is said about images; something is labelled."""
    if isinstance(said, InterleavedSample):
        texts = [part for part in said.sequence if isinstance(part, str)]
        if not all(isinstance(part, str | bytes) for part in said.sequence) or not any(map(str.strip, texts)):
            raise ValueError("sequence: expected texts and encoded images, and some text")
        _check_count(sum(text.count(IMAGE) for text in texts), 0, "texts have")
        return
    if not said.turns:
        raise ValueError("no question with an answer")
    _check_images(said.pictures)
    _check_count(sum(question.count(IMAGE) for question, _ in said.turns), len(said.pictures), "questions have")
    _check_count(sum(answer.count(IMAGE) for _, answer in said.turns), 0, "answers have")
    if not all(answer.strip() for _, answer in said.turns):
        raise ValueError("an answer is empty")


def _check_images(images: Sequence[Any]) -> None:
    for image in images:
        if not isinstance(image, bytes):
            raise ValueError(f"an image is a {type(image).__name__}, expected its encoded bytes")


def _check_count(found: int, expected: int, whose: str) -> None:
    if found != expected:
        raise ValueError(f"{whose} {found} {IMAGE}, expected {expected}, one for each image")
