"""How long samples are in tokens, and which DECODER_SEQ_LEN holds them."""

from __future__ import annotations

import functools
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

from megatron_patch.data.prompts import IMAGE, find_format, prompt_format
from megatron_patch.data.webdataset.workers import Tell

CLIP_L_336 = 576
"""Positions of a picture where the folder is no LLaVA's: LLaVA-1.5's, CLIP-L/14 at 336 pixels."""
MULTIPLE = 64
HELD = 0.999
"""Share of the samples that the suggested length holds whole."""
BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Positions of each sample: its text in the model's prompt format, with its pictures."""

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
            f"tokens ({self.prompt_format}, {self.num_image_tokens} a picture): median {self.quantile(0.5)}, "
            f"99.9% {self.quantile(HELD)}, longest {self.quantile(1)}; DECODER_SEQ_LEN {self.suggested} holds all but "
            f"{longer} samples"
        )


class Measure:
    """Counts tokens as training will. `folder`: a LLaVA's, or a language model's, from Hugging Face."""

    def __init__(self, folder: str) -> None:
        """Raises ValueError when the folder has no model."""
        self._folder = Path(folder)
        path = self._folder / "config.json"
        if not path.is_file():
            raise ValueError(f"--tokenizer {folder}: no config.json in it; expected a model's folder")
        config = json.loads(path.read_bytes())
        self._is_llava = "vision_config" in config
        vision = config.get("vision_config", {})
        # CLIPVisionConfig's own sizes where the file leaves them out.
        side = vision.get("image_size", 224) // vision.get("patch_size", 32)
        self.num_image_tokens = side**2 if self._is_llava else CLIP_L_336
        self._family = config.get("text_config", config).get("model_type", "")

    def count(self, conversations: Iterable[list[dict[str, str]]], tell: Tell) -> tuple[str, Counter[int]]:
        """Name of the prompt format, and length -> samples."""
        name, tokenizer, prompt = self._load()
        counts: Counter[int] = Counter()
        conversations = iter(conversations)
        while batch := [_turns(turns) for turns in islice(conversations, BATCH)]:
            texts = ["".join(piece for piece, _ in prompt.pieces(turns)) for turns in batch]
            pictures = [sum(question.count(IMAGE) for question, _ in turns) for turns in batch]
            for ids, number in zip(tokenizer(texts, add_special_tokens=False).input_ids, pictures, strict=True):
                # The last token is a label alone.
                counts[len(ids) - 1 + number * (self.num_image_tokens - 1)] += 1
            tell(len(batch))
        return name, counts

    @functools.cache  # noqa: B019  (once in each process, which ends with it)
    def _load(self) -> tuple[str, Any, Any]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this is one of several processes already
        from megatron_patch.data.tokenize import install_tokenizer, load_tokenizer

        name = find_format("auto", self._folder, self._family)
        if self._is_llava:
            tokenizer = load_tokenizer(self._folder)
        else:
            with TemporaryDirectory() as folder:
                install_tokenizer(self._folder, Path(folder))
                tokenizer = load_tokenizer(Path(folder))
        return name, tokenizer, prompt_format(name, tokenizer)


def _turns(turns: list[dict[str, str]]) -> list[tuple[str, str]]:
    values = [turn["value"] for turn in turns]
    return list(zip(values[::2], values[1::2], strict=True))
