"""Batches without files, in the sizes of LLaVA-Pretrain's: for measuring how fast a model trains."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any, Protocol

import numpy as np
import torch

from megatron_patch.data.task_encoder import Batch, EncodedSample, LlavaTaskEncoder
from megatron_patch.data.tokenize import IGNORE

PROMPT = 14
"""Tokens around the image, as a short question has them in `[INST] <image>\n...[/INST]`."""
BEFORE = 3
"""Those of them that stand before it."""
CAPTION = 27
"""Median length of an answer in tokens; with `SPREAD` a mean of 30."""
SPREAD = 0.45
"""Standard deviation of the answers' lengths, of their logarithm."""


class BatchLoader(Protocol):
    """What gives batches: a `loader.Loader` or a `MockLoader`."""

    fingerprint: dict[str, Any]
    is_closed: bool
    shared_memory: int

    def __iter__(self) -> Generator[Batch, None, None]: ...
    def begin(self) -> None: ...
    def close(self) -> None: ...
    def raise_if_killed(self, error: Exception) -> None: ...
    def save_state_rank(self) -> Any: ...
    def restore_state_rank(self, state: Any) -> None: ...


class MockLoader:
    """Endless micro batches of random tokens and images. What a batch holds follows from its number alone.

    It stands in for `loader.Loader`. Ranks take batches in turn, and the position is how many all have taken.
    """

    def __init__(
        self,
        encoder: LlavaTaskEncoder,
        fingerprint: dict[str, Any],
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        packs: bool,
        seed: list[int],
    ) -> None:
        self.fingerprint = fingerprint
        self.is_closed = False
        self.shared_memory = 0
        self._rank, self._world_size = rank, world_size
        self._encoder, self._batch_size, self._packs, self._seed = encoder, batch_size, packs, seed
        self._taken = 0

    def begin(self) -> None:
        """As `loader.Loader` has it; there is nobody to start."""

    def close(self) -> None:
        """As above."""

    def raise_if_killed(self, error: Exception) -> None:
        """As above."""

    def __iter__(self) -> Generator[Batch, None, None]:
        while True:
            number = self._taken + self._rank
            self._taken += self._world_size
            yield self._batch(number)

    def save_state_rank(self) -> int:
        """As energon's loaders have it."""
        return self._taken

    def restore_state_rank(self, state: int) -> None:
        """As energon's loaders have it."""
        self._taken = state

    def _batch(self, number: int) -> Batch:
        random = np.random.default_rng([*self._seed, number])
        if not self._packs:
            return self._encoder.batch([self._sample(random, number, index) for index in range(self._batch_size)])
        samples = [self._sample(random, number, 0)]
        room = self._encoder.max_length - self._encoder.segment_length(samples[0])
        while (length := self._encoder.segment_length(sample := self._sample(random, number, len(samples)))) <= room:
            samples.append(sample)
            room -= length
        return self._encoder.batch([self._encoder.pack_selected_samples(samples)])

    def _sample(self, random: np.random.Generator, number: int, index: int) -> EncodedSample:
        sizes = self._encoder.llava
        patches, limit = sizes.vision.num_image_tokens, self._encoder.max_length
        prompt = min(PROMPT, limit - patches - 1)
        answer = math.ceil(random.lognormal(math.log(CAPTION), SPREAD))
        text = torch.from_numpy(random.integers(0, sizes.language.vocab_size, prompt + answer))  # int64
        text[text == sizes.image_token_id] = 0
        before = min(BEFORE, prompt)
        image = torch.full((patches,), sizes.image_token_id)
        tokens = torch.cat([text[:before], image, text[before:]])
        labels = torch.cat([torch.full((patches + prompt,), IGNORE), text[prompt:]])
        height, width = self._encoder.image_settings.crop_size
        return EncodedSample(
            __key__=f"mock {number}.{index}",
            __restore_key__=(),
            input_ids=tokens[:-1][:limit],
            labels=labels[1:][:limit],
            pixels=torch.from_numpy(random.integers(0, 256, (1, 3, height, width), dtype=np.uint8)),
            num_truncated=max(0, len(tokens) - 1 - limit),
        )
