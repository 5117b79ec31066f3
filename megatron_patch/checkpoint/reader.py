"""What every store gives: a state dict whose tensors are read one at a time, when they are asked for."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class Reader(Mapping[str, Tensor]):
    """A lazy state dict. `reader[name]` reads one tensor; iterating gives names and reads none."""

    source: str
    """Where the tensors lie, for messages."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it where the store can tell."""
        return tuple(self[name].shape)

    def source_of(self, name: str) -> str:
        """Where one tensor lies, for messages."""
        return self.source


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

    def __getitem__(self, name: str) -> Tensor:
        return self.owner[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.owner)

    def __len__(self) -> int:
        return len(self.owner)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.owner[name].shape(name)

    def source_of(self, name: str) -> str:
        return self.owner[name].source


def existing_file(folder: Path, name: str, what: str) -> Path:
    """`folder`/`name`, or FileNotFoundError that says what is missing."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {what}")
    return path


def load_tensors(path: Path) -> dict:
    """`torch.load` of plain values and tensors. Raises ValueError, one line, for anything else or a damaged file."""
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a damaged file
        raise ValueError(
            f"{path}: not a file of tensors and plain values ({reason(error)}); expected one that "
            "torch.load(weights_only=True) reads"
        ) from error


def reason(error: Exception) -> str:
    """What a library's error says, on one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a small safetensors file. Raises ValueError, one line, for a damaged one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({reason(error)}); copy it again") from None
