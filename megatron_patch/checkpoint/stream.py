"""Copies views into files (or memory) with a few buffers, however large the model is.

Targets that are made of the same rows, as the ranks of a row-parallel or a replicated tensor are, advance together, so
that each byte of a source is read once. A band, some rows of such a group, is read and then goes through five stages,
each a thread: check against the source's manifest, cut and convert, digest, checksum, write. All of them leave
Python's lock while they work.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_patch.checkpoint.disk import BLOCK, InputFile, aligned_buffer, blocks
from megatron_patch.checkpoint.view import Source, Strip, View

BUFFER = 16 * 1024**2
"""Bytes that a band holds of its sources, and of its targets."""

NUM_BANDS = 5
"""Bands that are under way at once: two buffers each."""


class File(Protocol):
    """Where a target is written."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes at an offset."""


@dataclass(eq=False)
class Target:
    """A tensor to be written, and what was learned about its bytes when it has been."""

    name: str
    view: View
    file: File
    offset: int
    runs: Sequence[int] = ()
    """Rows after each of which a sha256 is taken. Empty: none."""

    has_crc: bool = False
    """Whether a CRC32 is taken of all of it."""

    crc: int = 0
    digests: list[str] = field(default_factory=list)


def copy(targets: Iterable[Target], progress: Callable[[int], object] = lambda num_bytes: None) -> None:
    """Write every target. `progress` gets the number of bytes of each piece that is written.

    Raises ValueError, which names file and tensor, for a source that ends early, that is not what its manifest says,
    or that holds values which the target's type cannot; OSError for what the disk refuses.
    """
    groups = grouped(targets)
    last_use = {source: number for number, group in enumerate(groups) for t in group for source in t.view.sources}
    capacity = max(
        [BUFFER, *(_row_bytes(strips, group) + _slack(strips) for group in groups for strips in _abreast(group))]
    )
    checker = Checker()
    hashers: dict[Target, RunDigest] = {t: RunDigest(t.runs) for group in groups for t in group if t.runs}

    def write(band: Band) -> None:
        for target, offset, data in band.written:
            target.file.write(target.offset + offset, data)
            progress(len(data))

    def digest(band: Band) -> None:
        for target, _, data in band.written:
            if target in hashers:
                hashers[target].update(target.view.columns * target.view.dtype.itemsize, data)

    stages = [checker.check, cut, digest, checksum, write]
    with ExitStack() as stack:
        files = Files(stack)
        line = stack.enter_context(Line(stages, [Band(capacity) for _ in range(min(NUM_BANDS, 1 + len(groups)))]))
        for number, group in enumerate(groups):
            top = 0
            for rows in banded(group, capacity):
                band = line.take()
                band.fill(group, top, rows, files)
                top += band.num_rows
                line.put(band)
            for source in {source for target in group for source in target.view.sources}:
                if last_use[source] == number:
                    source.release()
        line.finish()
        checker.complete(files)
    for target, hasher in hashers.items():
        target.digests = hasher.digests


def read(views: dict[str, View]) -> dict[str, Tensor]:
    """The tensors themselves, each in its own memory. Raises as `copy` does."""
    tensors = {name: torch.empty(view.shape, dtype=view.dtype) for name, view in views.items()}
    copy(Target(name, view, Memory(tensors[name]), 0) for name, view in views.items() if view.nbytes)
    return tensors


class Memory:
    """A tensor as a file to write into."""

    def __init__(self, tensor: Tensor) -> None:
        self.bytes = as_bytes(tensor)

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes at an offset."""
        self.bytes[offset : offset + len(data)] = torch.frombuffer(data, dtype=torch.uint8)


def grouped(targets: Iterable[Target]) -> list[list[Target]]:
    """Targets that are made of the same rows of the same sources together, in the order of the sources on the disk."""
    groups: dict[tuple, list[Target]] = {}
    for target in targets:
        strips = target.view.strips
        key = tuple((strip.rows, frozenset((part.source, part.row) for part in strip.parts)) for strip in strips)
        groups.setdefault(key, []).append(target)

    def place(group: list[Target]) -> tuple[str, int]:
        found = (part for part in group[0].view.strips[0].parts if part.source is not None)
        first = next(found, None)
        if first is None or first.source.path is None:
            return "", 0
        return str(first.source.path), first.source.offset + first.row * first.source.row_bytes

    return sorted(groups.values(), key=place)


def _abreast(group: Sequence[Target]) -> Iterator[tuple[Strip, ...]]:
    """The group's strips, the same rows of every target."""
    return zip(*(target.view.strips for target in group), strict=True)


def banded(group: Sequence[Target], capacity: int) -> Iterator[list[tuple[Strip, ...]]]:
    """A group's rows in pieces that fit into a band."""
    rows: list[tuple[Strip, ...]] = []
    used = 0
    for strips in _abreast(group):
        per_row, slack = _row_bytes(strips, group), _slack(strips)
        top = 0
        while top < strips[0].rows:
            count = min((capacity - used - slack) // per_row, strips[0].rows - top)
            if count < 1:
                yield rows
                rows, used = [], 0
                continue
            rows.append(tuple(strip.below(top, count) for strip in strips))
            used += count * per_row + slack
            top += count
    if rows:
        yield rows


def _row_bytes(strips: Sequence[Strip], group: Sequence[Target]) -> int:
    """What one row takes of a band's buffers, whichever of the two it takes more of."""
    incoming = sum(source.row_bytes for source, _ in _places(strips))
    outgoing = sum(target.view.columns * target.view.dtype.itemsize for target in group)
    return max(incoming, outgoing)


def _slack(strips: Sequence[Strip]) -> int:
    """Room that alignment may take: two blocks for each piece that is read, one for each target."""
    return (2 * len(_places(strips)) + len(strips)) * BLOCK


def _places(strips: Sequence[Strip]) -> dict[tuple[Source, int], None]:
    """Where the strips' rows lie: sources, and from which row on."""
    return {(part.source, part.row): None for strip in strips for part in strip.parts if part.source is not None}


class Band:
    """Some rows of a group of targets: the bytes that were read for them, and the bytes to write."""

    def __init__(self, capacity: int) -> None:
        self.incoming = aligned_buffer(capacity)
        self.outgoing = aligned_buffer(capacity)

    def fill(self, group: Sequence[Target], top: int, rows: list[tuple[Strip, ...]], files: Files) -> None:
        """Read `rows`, which begin at row `top` of the group's targets."""
        self.group, self.top, self.rows = group, top, rows
        self.num_rows = sum(strips[0].rows for strips in rows)
        # Per entry of `rows`: (source, first row) -> the bytes of those rows, whole.
        self.read: list[dict[tuple[Source, int], memoryview]] = []
        # Target, where in it (bytes), what.
        self.written: list[tuple[Target, int, memoryview]] = []
        used = 0
        for strips in rows:
            found = {}
            for source, row in _places(strips):
                length = strips[0].rows * source.row_bytes
                found[source, row] = files.read(source, row, length, self.incoming[used:])
                used += blocks(length) + 2 * BLOCK
            self.read.append(found)


class Files:
    """Sources that are open. They are closed with `stack`."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.open: dict[object, InputFile] = {}

    def read(self, source: Source, row: int, length: int, buffer: memoryview) -> memoryview:
        """`length` bytes of a source from a row on, somewhere in `buffer`."""
        if source.path is None:
            buffer = buffer[:length]
            start = row * source.row_bytes
            torch.frombuffer(buffer, dtype=torch.uint8).copy_(as_bytes(source.made)[start : start + length])
            return buffer
        if source.path not in self.open:
            self.open[source.path] = self.stack.enter_context(closing(InputFile(source.path)))
        return self.open[source.path].read(source.offset + row * source.row_bytes, length, buffer)


def cut(band: Band) -> None:
    """Stage: every target's columns of what was read, in the target's type."""
    used = 0
    for number, target in enumerate(band.group):
        view = target.view
        length = band.num_rows * view.columns * view.dtype.itemsize
        data = band.outgoing[used : used + length]
        used += blocks(length)
        matrix = torch.frombuffer(data, dtype=view.dtype).view(band.num_rows, view.columns)
        top = 0
        for strips, found in zip(band.rows, band.read, strict=True):
            strip = strips[number]
            left = 0
            for part in strip.parts:
                place = matrix[top : top + strip.rows, left : left + part.width]
                if part.source is None:
                    place.zero_()
                else:
                    rows = as_matrix(found[part.source, part.row], part.source)
                    convert(rows[:, part.column : part.column + part.width], place, target.name)
                left += part.width
            top += strip.rows
        band.written.append((target, band.top * view.columns * view.dtype.itemsize, data))


def checksum(band: Band) -> None:
    """Stage: CRC32 of the targets that have one."""
    for target, _, data in band.written:
        if target.has_crc:
            target.crc = zlib.crc32(data, target.crc)


def convert(values: Tensor, place: Tensor, name: str) -> None:
    """Copy `values` into `place`, which may have another type. Raises ValueError for values too large for fp16."""
    place.copy_(values)
    narrower = place.dtype == torch.float16 and values.dtype != torch.float16
    if narrower and not torch.equal(place.isfinite(), values.isfinite()):
        raise ValueError(f"{name}: holds values that fp16 cannot (beyond 65504); use bf16 or fp32")


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes, as a vector."""
    return tensor.reshape(-1).view(torch.uint8)


def as_matrix(data: memoryview, source: Source) -> Tensor:
    """Rows of a source, as they lie in the file."""
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if flat.data_ptr() % source.dtype.itemsize:  # a header of odd length, which safetensors allows
        flat = flat.clone()
    return flat.view(source.dtype).view(-1, source.columns)


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

    def check(self, band: Band) -> None:
        """Stage: see what was read for a band."""
        for found in band.read:
            for (source, row), data in found.items():
                if source.digests:
                    self.see(source, row, data)

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

    def complete(self, files: Files) -> None:
        """Read runs of which only a part was needed, so that no touched run goes unchecked."""
        for (source, number), (position, _) in list(self.passing.items()):
            top = sum(rows for rows, _ in source.digests[:number])
            end = top + source.digests[number][0]
            if position < end:
                del self.passing[source, number]
                count = max(1, BUFFER // source.row_bytes)
                buffer = aligned_buffer(count * source.row_bytes + 2 * BLOCK)
                for row in range(top, end, count):
                    length = min(count, end - row) * source.row_bytes
                    self.see(source, row, files.read(source, row, length, buffer))


class Line:
    """Stages that bands pass through in order, each a thread. The first error stops them all and is raised here."""

    def __init__(self, stages: Sequence[Callable[[Band], None]], bands: Sequence[Band]) -> None:
        self.free: queue.SimpleQueue[Band] = queue.SimpleQueue()
        self.num_bands = len(bands)
        for band in bands:
            self.free.put(band)
        self.error: BaseException | None = None
        queues = [queue.SimpleQueue() for _ in stages]
        self.first = queues[0]
        self.threads = [
            threading.Thread(target=self._work, args=(stage, source, target), daemon=True)
            for stage, source, target in zip(stages, queues, [*queues[1:], self.free], strict=True)
        ]

    def __enter__(self) -> Line:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.error = self.error or error  # what is under way is not worth finishing
        self.first.put(None)
        for thread in self.threads:
            thread.join()

    def take(self) -> Band:
        """A band that is free. Waits for one."""
        band = self.free.get()
        if self.error is not None:
            raise self.error
        return band

    def put(self, band: Band) -> None:
        """Send a band on its way."""
        self.first.put(band)

    def finish(self) -> None:
        """Wait until all bands are through."""
        for _ in range(self.num_bands):
            self.take()

    def _work(self, stage: Callable[[Band], None], source: queue.SimpleQueue, target: queue.SimpleQueue) -> None:
        while (band := source.get()) is not None:
            if self.error is None:
                try:
                    stage(band)
                except BaseException as error:
                    self.error = error
            target.put(band)
        target.put(None)
