"""Where a tensor's values lie, without reading them: the plan of a conversion.

A `View` is a tensor put together from rectangles of stored tensors. It is narrowed, joined and reshaped like a
torch.Tensor, which moves no byte; `read` gives the tensor, and `stream.py` copies views into files with a few buffers.
All tensors are seen as [rows, columns] here: axis 0, and the others together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_patch.tensor_io.archives import Record


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor that is there: bytes of a file, row after row. Its identity is the object's own."""

    name: str
    """How it is called where it lies, for messages: file and tensor."""

    dtype: torch.dtype
    rows: int
    columns: int
    path: Path | None = None
    offset: int = 0
    """Where it begins in the file."""

    make: Callable[[], Tensor] | None = None
    """Gives the tensor, where there is no file of its plain bytes. It is whole in memory while it is copied."""

    digests: tuple[tuple[int, str], ...] = ()
    """(rows, sha256) of its runs from the first row to the last, as a manifest says. Empty: nothing to check."""

    record: Record | None = None
    """Where no manifest says digests: bytes that hold this tensor, maybe with others, and their CRC-32."""

    @property
    def runs(self) -> tuple[tuple[int, str | None], ...]:
        """Rows that are checked together, and the sha256 of them; None: a CRC-32 is taken for the record."""
        return self.digests or (((self.rows, None),) if self.record else ())

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.columns * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.rows * self.row_bytes

    @cached_property
    def made(self) -> Tensor:
        """What `make` gives, [rows, columns]."""
        assert self.make is not None, self.name
        return self.make().detach().reshape(self.rows, self.columns).contiguous()

    def release(self) -> None:
        """Let go of what `make` gave."""
        self.__dict__.pop("made", None)

    def seen_as(self, rows: int, columns: int) -> Source:
        """The same bytes with rows of another length."""
        whole = self.digests if len(self.digests) < 2 else ()
        digests = tuple((rows, digest) for _, digest in whole)
        make = None if self.make is None else lambda: self.made
        return Source(self.name, self.dtype, rows, columns, self.path, self.offset, make, digests, self.record)


class Columns(NamedTuple):
    """Columns of a source, from one of its rows on. Source None: zeros."""

    source: Source | None
    row: int
    column: int
    width: int


class Strip(NamedTuple):
    """Some rows of a view, and the parts that give them, from left to right."""

    rows: int
    parts: tuple[Columns, ...]

    def below(self, start: int, rows: int) -> Strip:
        """`rows` of its rows from `start` on."""
        return Strip(rows, tuple(part._replace(row=part.row + start) for part in self.parts))


@dataclass(frozen=True, eq=False)
class View:
    """A tensor of `shape` made of `strips` from top to bottom, in `dtype` once it is read or written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strips: tuple[Strip, ...] = field(repr=False)

    @staticmethod
    def of(source: Source, shape: Sequence[int]) -> View:
        """All of a stored tensor."""
        return View(tuple(shape), source.dtype, (Strip(source.rows, (Columns(source, 0, 0, source.columns),)),))

    @staticmethod
    def of_tensor(tensor: Tensor, name: str) -> View:
        """A tensor that is in memory."""
        return View.made(lambda: tensor, tuple(tensor.shape), tensor.dtype, name)

    @staticmethod
    def made(make: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, name: str) -> View:
        """A tensor that `make` gives when it is needed."""
        rows, columns = as_rows(shape)
        return View.of(Source(name, dtype, rows, columns, make=make), shape)

    @property
    def rows(self) -> int:
        """Length of axis 0."""
        return as_rows(self.shape)[0]

    @property
    def columns(self) -> int:
        """Length of all other axes together."""
        return as_rows(self.shape)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in `dtype`."""
        return self.rows * self.columns * self.dtype.itemsize

    def to(self, dtype: torch.dtype | None) -> View:
        """In another type (None: as it is). Values are converted when they are read."""
        return View(self.shape, dtype or self.dtype, self.strips)

    def unchecked(self) -> View:
        """The same values, read without comparing them with a manifest or a CRC-32: for what is read a second time."""
        plain: dict[Source | None, Source] = {
            source: replace(source, digests=(), record=None) for source in self.sources
        }
        strips = (
            Strip(strip.rows, tuple(part._replace(source=plain.get(part.source)) for part in strip.parts))
            for strip in self.strips
        )
        return View(self.shape, self.dtype, tuple(strips))

    def narrow(self, axis: int, start: int, length: int) -> View:
        """torch.Tensor.narrow along axis 0, or axis 1 of a matrix."""
        shape = (*self.shape[:axis], length, *self.shape[axis + 1 :])
        if not 0 <= start <= start + length <= self.shape[axis] or axis > 1 or (axis == 1 and len(shape) != 2):
            raise ValueError(f"cannot take {length} from {start} on along axis {axis} of shape {list(self.shape)}")
        if axis == 0:
            return View(shape, self.dtype, tuple(between(self.strips, start, start + length)))
        cut = (Strip(strip.rows, tuple(_columns(strip.parts, start, start + length))) for strip in self.strips)
        return View(shape, self.dtype, tuple(cut))

    @staticmethod
    def cat(views: Sequence[View], axis: int = 0) -> View:
        """torch.cat along axis 0, or axis 1 of matrices. All must have one dtype."""
        first = views[0]
        if any(view.dtype != first.dtype for view in views):
            raise ValueError(f"cannot join tensors of types {', '.join(str(view.dtype) for view in views)}")
        length = sum(view.shape[axis] for view in views)
        shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])
        if any((*view.shape[:axis], length, *view.shape[axis + 1 :]) != shape for view in views):
            raise ValueError(f"cannot join shapes {', '.join(str(list(view.shape)) for view in views)}")
        if axis == 0:
            return View(shape, first.dtype, tuple(strip for view in views for strip in view.strips))
        edges = sorted({edge for view in views for edge in _edges(view.strips)})
        strips = []
        for start, end in zip([0, *edges], edges, strict=False):
            beside = [strip for view in views for strip in between(view.strips, start, end)]
            strips.append(Strip(end - start, tuple(part for strip in beside for part in strip.parts)))
        return View(shape, first.dtype, tuple(strips))

    def reshape(self, *shape: int) -> View:
        """torch.Tensor.reshape. Where rows get another length, only of one whole stored tensor."""
        known = math.prod(length for length in shape if length != -1)
        count = self.rows * self.columns
        shape = tuple(count // known if length == -1 else length for length in shape)
        rows, columns = as_rows(shape)
        if rows * columns != count:
            raise ValueError(f"cannot reshape {list(self.shape)} to {list(shape)}")
        if (rows, columns) == (self.rows, self.columns):
            return View(shape, self.dtype, self.strips)
        source = self.strips[0].parts[0].source
        if source is None or source.rows * source.columns != count:
            raise ValueError(f"cannot reshape {list(self.shape)} to {list(shape)}: it is not one stored tensor")
        return View.of(source.seen_as(rows, columns), shape).to(self.dtype)

    def new_zeros(self, *shape: int) -> View:
        """Zeros of the same type."""
        rows, columns = as_rows(shape)
        return View(shape, self.dtype, (Strip(rows, (Columns(None, 0, 0, columns),)),) if rows else ())

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The stored tensors that it is made of, each once."""
        found = (part.source for strip in self.strips for part in strip.parts if part.source is not None)
        return tuple(dict.fromkeys(found))


def as_rows(shape: Sequence[int]) -> tuple[int, int]:
    """A shape seen as [rows, columns]; a vector has one column."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def between(strips: Iterable[Strip], start: int, end: int) -> Iterator[Strip]:
    """Rows `start` to `end` of some strips."""
    top = 0
    for strip in strips:
        first, last = max(start, top), min(end, top + strip.rows)
        if first < last:
            yield strip.below(first - top, last - first)
        top += strip.rows


def _columns(parts: Iterable[Columns], start: int, end: int) -> Iterator[Columns]:
    left = 0
    for part in parts:
        first, last = max(start, left), min(end, left + part.width)
        if first < last:
            yield part._replace(column=part.column + first - left, width=last - first)
        left += part.width


def _edges(strips: Iterable[Strip]) -> Iterator[int]:
    """Where strips end."""
    bottom = 0
    for strip in strips:
        bottom += strip.rows
        yield bottom
