"""sha256 of tensors while their bytes pass: to put into a manifest, and to compare with one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from megatron_patch.checkpoint.disk import BLOCK, aligned_buffer
from megatron_patch.checkpoint.view import Source


class RunDigest:
    """sha256 of consecutive runs of rows, while their bytes pass in order."""

    def __init__(self, runs: Sequence[int]) -> None:
        self.left = list(runs)
        self.hasher = hashlib.sha256()
        self.digests: list[str] = []

    def update(self, row_bytes: int, data: memoryview) -> None:
        """The next bytes, whole rows."""
        while len(data):
            count = min(len(data), self.left[0] * row_bytes)
            self.hasher.update(data[:count])
            data = data[count:]
            self.left[0] -= count // row_bytes
            if self.left[0] == 0:
                self.digests.append(self.hasher.hexdigest())
                self.left.pop(0)
                self.hasher = hashlib.sha256()


class Checker:
    """Compares sources with their manifest's digests, run by run, while their bytes pass."""

    def __init__(self) -> None:
        # Per run of a source that was touched: the first row that has not passed, and the digest of those that have.
        self.passing: dict[tuple[Source, int], tuple[int, object]] = {}

    def see(self, source: Source, row: int, data: memoryview) -> None:
        """Rows of a source, from `row` on. Raises ValueError when they complete a run that is not as it was."""
        end = row + len(data) // source.row_bytes
        top = 0
        for number, (rows, expected) in enumerate(source.digests):
            first, last = max(row, top), min(end, top + rows)
            if first < last:
                position, hasher = self.passing.get((source, number)) or (top, hashlib.sha256())
                if first <= position < last:  # else seen before, or rows were left out: `complete` reads it again
                    hasher.update(data[(position - row) * source.row_bytes : (last - row) * source.row_bytes])
                    position = last
                    if position == top + rows and hasher.hexdigest() != expected:
                        raise ValueError(
                            f"{source.name}: rows {top} to {top + rows - 1} are not what was written (sha256 differs "
                            "from manifest.json); convert or copy the checkpoint again"
                        )
                self.passing[source, number] = (position, hasher)
            top += rows

    def complete(self, read: Callable[[Source, int, int, memoryview], memoryview], size: int) -> None:
        """Read runs of which only a part was needed, about `size` bytes at a time, so that none goes unchecked."""
        for (source, number), (position, _) in list(self.passing.items()):
            top = sum(rows for rows, _ in source.digests[:number])
            end = top + source.digests[number][0]
            if position == end:
                continue
            del self.passing[source, number]
            count = max(1, size // source.row_bytes)
            buffer = aligned_buffer(count * source.row_bytes + 2 * BLOCK)
            for row in range(top, end, count):
                length = min(count, end - row) * source.row_bytes
                self.see(source, row, read(source, row, length, buffer))
