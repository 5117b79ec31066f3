"""What every store gives: a state dict that says where its tensors lie, and reads one when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from megatron_patch.tensor_io import stream
from megatron_patch.tensor_io.archives import Archive, Stored, open_archive
from megatron_patch.tensor_io.opcodes import Refused, why_not_loaded
from megatron_patch.tensor_io.pickles import load_plain
from megatron_patch.tensor_io.torch_zip import describe
from megatron_patch.tensor_io.view import Source, View, as_rows


class Reader(Mapping[str, Tensor]):
    """A lazy state dict. `reader.view(name)` is the plan of a tensor, `reader[name]` reads it; names cost nothing.

    A store has `view` or `__getitem__`; each is made of the other.
    """

    source: str
    """Where the tensors lie, for messages."""

    def view(self, name: str) -> View:
        """Where one tensor's values lie."""
        return View.of_tensor(self[name], f"{self.source_of(name)}: {name}")

    def __getitem__(self, name: str) -> Tensor:
        """Raises ValueError or OSError when its bytes are not there, or not what a manifest says."""
        return stream.read({name: self.view(name)})[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it where the store can tell."""
        return tuple(self.view(name).shape)

    def source_of(self, name: str) -> str:
        """Where one tensor lies, for messages."""
        return self.source


class Views(Reader):
    """Plans of tensors, made of those that `origin` has by the same names."""

    def __init__(self, views: Mapping[str, View], origin: Reader) -> None:
        self.views = views
        self.origin = origin
        self.source = origin.source

    def view(self, name: str) -> View:
        """Where one tensor's values lie."""
        return self.views[name]

    def source_of(self, name: str) -> str:
        """Where one tensor lies, for messages."""
        return self.origin.source_of(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)


class InMemory(Reader):
    """Tensors that are there already."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self.tensors = tensors
        self.source = source

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Joined(Reader):
    """Several stores as one. Raises ValueError when two of them hold a tensor of the same name."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.owner: dict[str, Reader] = {}
        for reader in readers:
            for name in reader:
                if name in self.owner:
                    raise ValueError(f"{name}: in {self.owner[name].source} and in {reader.source}; expected in one")
                self.owner[name] = reader
        self.source = ", ".join(reader.source for reader in readers)

    def view(self, name: str) -> View:
        """Where one tensor's values lie."""
        return self.owner[name].view(name)

    def __getitem__(self, name: str) -> Tensor:
        return self.owner[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.owner)

    def __len__(self) -> int:
        return len(self.owner)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.owner[name].shape(name)

    def source_of(self, name: str) -> str:
        return self.owner[name].source_of(name)


def existing_file(folder: Path, name: str, what: str) -> Path:
    """`folder`/`name`, or FileNotFoundError that says what is missing."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {what}")
    return path


def open_torch_file(path: Path, skip: bool = False) -> dict:
    """What a file of torch.save holds, with `Stored` in the place of its tensors: none is read. `skip`: as `describe`.

    A file whose tensors are no plain byte ranges (from before torch 1.6, compressed, not contiguous) is mapped into
    memory and holds tensors. Raises ValueError, one line, for a damaged file or one that holds more than plain values.
    """
    archive = None
    try:
        with path.open("rb") as file:
            archive = open_archive(file)
        return describe(archive, skip=skip)
    except Refused as error:
        raise ValueError(f"{path}: not a file of tensors and plain values ({error})") from None
    except Exception:  # what is wrong, if anything, torch.load says in `load_tensors`
        return load_tensors(path, archive)


def stored_view(path: Path, name: str, value: Stored | Tensor, digests: Sequence[tuple[int, str]] = ()) -> View:
    """A tensor as `open_torch_file` gives it. `digests`: (rows, sha256) of its runs."""
    label = f"{path}: {name}"
    rows, columns = as_rows(value.shape)
    if isinstance(value, Tensor):
        source = Source(label, value.dtype, rows, columns, make=lambda: value, digests=tuple(digests))
    else:
        record = None if digests else value.record
        source = Source(label, value.dtype, rows, columns, path, value.offset, digests=tuple(digests), record=record)
    return View.of(source, value.shape)


def load_tensors(path: Path, archive: Archive | None = None) -> dict:
    """`torch.load` of plain values and tensors. Raises ValueError, one line, for anything else or a damaged file.

    `archive`: what the file is, where it was opened before.
    """
    try:
        return load_plain(path, archive, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a damaged file
        raise ValueError(
            f"{path}: not a file of tensors and plain values ({why_not_loaded(error)}); expected one that "
            "torch.load(weights_only=True) reads"
        ) from error


def reason(error: Exception) -> str:
    """What a library's error says, on one line."""
    return next(iter(re.sub("\x1b\\[[0-9;]*m", "", str(error)).splitlines()), type(error).__name__)
