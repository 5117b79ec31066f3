"""sha256 of tensors while their bytes pass: to put into a manifest, and to compare with one."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.tensor_io.archives import crc_of
from megatron_patch.tensor_io.crc32 import combine
from megatron_patch.tensor_io.disk import BLOCK, aligned_buffer
from megatron_patch.tensor_io.view import Record, Source


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


class _Crc:
    """CRC-32 with a hasher's methods."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: memoryview) -> None:
        self.value = zlib.crc32(data, self.value)


def _hasher(expected: str | None) -> Any:
    """Of a run with this sha256; None: of one whose CRC-32 is taken."""
    return _Crc() if expected is None else hashlib.sha256()


class Checker:
    """Compares sources with their manifest's digests, or their file's CRC-32, while their bytes pass."""

    def __init__(self) -> None:
        # Per run of a source that was touched: the first row that has not passed, and the digest of those that have.
        self.passing: dict[tuple[Source, int], tuple[int, Any]] = {}
        # Per record of a file: what has passed, by its offset.
        self.records: dict[tuple[Path, Record], dict[int, tuple[Source, int]]] = {}

    def see(self, source: Source, row: int, data: memoryview) -> None:
        """Rows of a source, from `row` on. Raises ValueError when they complete a run that is not as it was."""
        end = row + len(data) // source.row_bytes
        top = 0
        for number, (rows, expected) in enumerate(source.runs):
            first, last = max(row, top), min(end, top + rows)
            if first < last:
                position, hasher = self.passing.get((source, number)) or (top, _hasher(expected))
                if first <= position < last:  # else seen before, or rows were left out: `complete` reads it again
                    hasher.update(data[(position - row) * source.row_bytes : (last - row) * source.row_bytes])
                    position = last
                    if position == top + rows and expected is None:
                        assert source.path is not None, "else `runs` has a sha256"
                        assert source.record is not None, "else `runs` has a sha256"
                        self.records.setdefault((source.path, source.record), {})[source.offset] = source, hasher.value
                    elif position == top + rows and hasher.hexdigest() != expected:
                        raise ValueError(
                            f"{source.name}: rows {top} to {top + rows - 1} are not what was written (sha256 differs "
                            "from manifest.json); convert or copy the checkpoint again"
                        )
                self.passing[source, number] = (position, hasher)
            top += rows

    def complete(self, read: Callable[[Source, int, int, memoryview], memoryview], size: int, rest: bool) -> None:
        """Read runs of which only a part was needed, about `size` bytes at a time, so that none goes unchecked.

        `rest`: do so with records, too; else one of which a part did not pass is not compared.
        """
        for (source, number), (position, _) in list(self.passing.items()):
            top = sum(rows for rows, _ in source.runs[:number])
            rows, expected = source.runs[number]
            if position == top + rows or (expected is None and not rest):
                continue
            del self.passing[source, number]
            count = max(1, size // source.row_bytes)
            buffer = aligned_buffer(count * source.row_bytes + 2 * BLOCK)
            for row in range(top, top + rows, count):
                length = min(count, top + rows - row) * source.row_bytes
                self.see(source, row, read(source, row, length, buffer))
        for (path, record), seen in self.records.items():
            _check_record(path, record, seen, rest)


def _check_record(path: Path, record: Record, seen: dict[int, tuple[Source, int]], rest: bool) -> None:
    """Put the CRC-32 of what has passed together with that of the bytes between, and compare it with the file's."""
    crc, position, end = 0, record.offset, record.offset + record.size
    with path.open("rb") as file:
        for offset in sorted(seen):
            source, own = seen[offset]
            if offset < position:  # of bytes that another tensor has, too
                continue
            if offset > position and not rest:
                return
            crc = combine(crc, crc_of(file, position, offset - position), offset - position)
            crc = combine(crc, own, source.nbytes)
            position = offset + source.nbytes
        if position < end and not rest:
            return
        crc = combine(crc, crc_of(file, position, end - position), end - position)
    if crc != record.crc:
        more = f" and {len(seen) - 1} more" if len(seen) > 1 else ""
        name = next(iter(seen.values()))[0].name
        raise ValueError(f"{name}{more}: not what was written (CRC-32 differs); download or copy the file again")
