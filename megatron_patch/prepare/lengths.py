"""How long samples are in tokens, and which DECODER_SEQ_LEN holds them."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_patch.data.prompts import IMAGE, Turn, find_format, prompt_format
from megatron_patch.families.clip import CLIP
from megatron_patch.families.hf_config import describe_vision_model, features
from megatron_patch.prepare.workers import Tell

CLIP_L_336 = 576
"""Positions of an image where the folder is no LLaVA's: LLaVA-1.5's, CLIP-L/14 at 336 pixels."""
MULTIPLE = 64
HELD = 0.999
"""Share of the samples that the suggested length holds whole."""
BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Positions of each sample: its text in the model's prompt format, with its images."""

    counts: Counter[int]
    """Length -> samples."""
    prompt_format: str
    num_image_tokens: int

    def quantile(self, share: float) -> int:
        """The smallest length that `share` of the samples do not exceed."""
        left = math.ceil(share * self.counts.total())
        for length in sorted(self.counts):
            left -= self.counts[length]
            if left <= 0:
                return length
        raise AssertionError("no samples")

    @property
    def suggested(self) -> int:
        """The smallest multiple of 64 that holds 99.9% of the samples."""
        return math.ceil(self.quantile(HELD) / MULTIPLE) * MULTIPLE

    def __str__(self) -> str:
        longer = sum(count for length, count in self.counts.items() if length > self.suggested)
        return (
            f"tokens ({self.prompt_format}, {self.num_image_tokens} an image): median {self.quantile(0.5)}, "
            f"99.9% {self.quantile(HELD)}, longest {self.quantile(1)}; DECODER_SEQ_LEN {self.suggested} holds all but "
            f"{longer} samples"
        )


class Measure:
    """Counts tokens as training will. `folder`: a LLaVA's, or a language model's, from Hugging Face."""

    def __init__(self, folder: str) -> None:
        """Reads all that it needs, which forked processes share. Raises ValueError when the folder has no model."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"--tokenizer {folder}: no config.json in it; expected a model's folder")
        try:
            config = json.loads(path.read_bytes())
            vision = config.get("vision_config")
            self.num_image_tokens = CLIP_L_336
            if vision is not None:
                tower = {"model_type": CLIP.name, **vision}  # as transformers, where the file names none
                self.num_image_tokens = describe_vision_model(tower, *features(config)).num_image_tokens
            family = (config.get("text_config") or config).get("model_type", "")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"--tokenizer {folder}: its config.json is no model's ({error}); copy it again") from None
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # several processes count
        try:
            self._tokenizer = _load(Path(folder), is_llava=vision is not None)
            self.prompt_format = find_format("auto", Path(folder), family)
            self._prompt = prompt_format(self.prompt_format, self._tokenizer)
        except ValueError as error:
            raise ValueError(f"--tokenizer {folder}: {error}") from None

    def count(self, conversations: Iterable[list[Turn]], tell: Tell) -> Counter[int]:
        """Length -> samples."""
        counts: Counter[int] = Counter()
        conversations = iter(conversations)
        while batch := list(islice(conversations, BATCH)):
            texts = ["".join(piece for piece, _ in self._prompt.pieces(turns)) for turns in batch]
            images = [sum(question.count(IMAGE) for question, _ in turns) for turns in batch]
            for ids, number in zip(self._tokenizer(texts, add_special_tokens=False).input_ids, images, strict=True):
                # The last token is a label alone.
                counts[len(ids) - 1 + number * (self.num_image_tokens - 1)] += 1
            tell(len(batch))
        return counts


def _load(folder: Path, *, is_llava: bool) -> Any:
    from megatron_patch.data.tokenize import load_tokenizer
    from megatron_patch.data.tokenizer_files import install_tokenizer

    if is_llava:
        return load_tokenizer(folder)
    with TemporaryDirectory() as copy:
        install_tokenizer(folder, Path(copy))
        return load_tokenizer(Path(copy))
