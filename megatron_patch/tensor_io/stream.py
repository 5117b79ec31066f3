"""Copies views into files (or memory) with a few buffers, however large the model is.

Targets that are made of the same rows, as the ranks of a row-parallel or a replicated tensor are, advance together, so
that each byte of a source is read once. A band, some rows of such a group, is read and then goes through five stages,
each a thread: check against the source's manifest, slice and convert, digest, checksum, write. All of them leave
Python's lock while they work.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_patch.tensor_io.digest import Checker, RunDigest
from megatron_patch.tensor_io.disk import BLOCK, InputFile, aligned_buffer, blocks
from megatron_patch.tensor_io.threads import Line
from megatron_patch.tensor_io.view import Source, Strip, View

BUFFER = 8 * 1024**2
"""Bytes that a band holds of its sources, and of its targets."""

NUM_BANDS = 6
"""Bands that are under way at once: two buffers each."""


class File(Protocol):
    """Where a target is written."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes at an offset."""


@dataclass(eq=False)
class Target:
    """A tensor to be written, and what became known of its bytes when it has been."""

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


def copy(
    targets: Iterable[Target], progress: Callable[[int], object] = lambda num_bytes: None, rest: bool = True
) -> None:
    """Write every target. `progress` gets the number of bytes of each piece that is written.

    `rest`: where a file of torch.save has one CRC-32 for many tensors, read those that no target needs to compare it.

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

    def check(band: Band) -> None:
        for found in band.read:
            for (source, row), data in found.items():
                checker.see(source, row, data)

    def digest(band: Band) -> None:
        for target, _, data in band.written:
            if target in hashers:
                hashers[target].update(target.view.columns * target.view.dtype.itemsize, data)

    stages = [check, cut, digest, checksum, write]
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
        checker.complete(files.read, BUFFER, rest)
    for target, hasher in hashers.items():
        target.digests = hasher.digests


def read(views: dict[str, View]) -> dict[str, Tensor]:
    """The tensors themselves, each in its own memory. Raises as `copy` does."""
    tensors = {name: torch.empty(view.shape, dtype=view.dtype) for name, view in views.items()}
    copy((Target(name, view, TensorFile(tensors[name]), 0) for name, view in views.items() if view.nbytes), rest=False)
    return tensors


class TensorFile:
    """A tensor as a file to write into."""

    def __init__(self, tensor: Tensor) -> None:
        self.bytes = as_bytes(tensor).numpy()

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes at an offset."""
        self.bytes[offset : offset + len(data)] = np.frombuffer(data, np.uint8)


def grouped(targets: Iterable[Target]) -> list[list[Target]]:
    """Targets that are made of the same rows of the same sources together, in the order of the sources on the disk."""
    groups: dict[tuple, list[Target]] = {}
    for target in targets:
        strips = target.view.strips
        key = tuple((strip.rows, frozenset((part.source, part.row) for part in strip.parts)) for strip in strips)
        groups.setdefault(key, []).append(target)

    def place(group: list[Target]) -> tuple[str, int]:
        found = ((part.source, part.row) for part in group[0].view.strips[0].parts if part.source is not None)
        source, row = next(found, (None, 0))
        if source is None or source.path is None:
            return "", 0
        return str(source.path), source.offset + row * source.row_bytes

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
                    convert(rows[:, part.column : part.column + part.width], place, part.source.name)
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
    if values.dtype == place.dtype:
        # On this thread alone. torch would copy with several, which then spin and take time from the other stages:
        # twice the processor time of the whole conversion.
        np.copyto(place.view(torch.uint8).numpy(), values.view(torch.uint8).numpy())
        return
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
