"""Samples that cannot be read: counted, left out, and too many of them an error."""

from __future__ import annotations

import logging
import math
import multiprocessing
from pathlib import Path
from typing import Any

from megatron.energon.errors import FatalSampleError

from megatron_patch.files.text import printable

logger = logging.getLogger(__name__)

MAX_UNREADABLE_SHARE = 0.01
"""Part of a rank's samples that may be left out because they cannot be read; more end the run."""


class Failures:
    """Counts samples that cannot be read, over all workers of a loader, and ends the run when they are too many."""

    def __init__(self, dataset: Path, num_samples: int) -> None:
        """`num_samples`: of this rank, which `MAX_UNREADABLE_SHARE` is taken of."""
        self.dataset = dataset
        self.allowed = math.ceil(MAX_UNREADABLE_SHARE * num_samples)
        self._message = f"{dataset}: more than {self.allowed} of a rank's {num_samples} samples cannot be read"
        self._count = multiprocessing.get_context("fork").Value("i", 0)
        # Of this process: each worker has its own part of the samples, and an epoch later they come again.
        self._keys: set[str] = set()

    @property
    def count(self) -> int:
        """Samples that were left out so far."""
        return self._count.value

    def __call__(self, error: Exception, sample: Any, sources: Any = None) -> None:
        """Energon's error handler: one log line, or FatalSampleError, which energon hands on."""
        key = _key(sample)
        if key in self._keys:
            return
        self._keys.add(key)
        with self._count.get_lock():
            self._count.value += 1
        reason = printable(str(error) or error.__cause__ or type(error).__name__, 400)
        logger.warning("left out sample %s: %s", key, reason)
        if self.count > self.allowed:
            raise FatalSampleError(f"{self._message}; the log names them; the last: {reason}")


def _key(sample: Any) -> str:
    """The key of whatever energon was handling: a raw sample, a typed one, a batch of them."""
    if isinstance(sample, list):
        return ", ".join(map(_key, sample))
    parts = getattr(sample, "data", None)
    name = sample.get("__key__") if isinstance(sample, dict) else getattr(sample, "__key__", None)
    return printable(name or (_key(parts[0]) if parts else sample), 200)
