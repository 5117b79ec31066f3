"""Hugging Face folders: safetensors or .bin, one file or shards with an index. Read lazily, written shard by shard."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_patch.checkpoint.reader import Reader, existing_file, load_tensors, reason

# In the order in which transformers looks for them.
FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


class HfReader(Reader):
    """The tensors of a Hugging Face folder.

    `rename` turns the files' spelling of a name into the families' (`Part.hub_name`), or into None for a tensor that
    is left out on purpose. Raises FileNotFoundError or ValueError, one line that names the file, for weights that are
    missing, damaged, or contradict their index.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str | None] = lambda name: name) -> None:
        folder = Path(folder)
        self.source = str(folder)
        self.place: dict[str, tuple[_SafetensorsFile | _BinFile, str]] = {}
        for file, names in _open_files(folder):
            for name in names:
                renamed = rename(name)
                if renamed is None:
                    continue
                if renamed in self.place:
                    other, other_name = self.place[renamed]
                    raise ValueError(
                        f"{file.path}: holds {name}, and {other.path} holds {other_name}: the same tensor twice; "
                        "expected each tensor once"
                    )
                self.place[renamed] = (file, name)

    def __getitem__(self, name: str) -> Tensor:
        file, stored_name = self.place[name]
        return file.tensor(stored_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored_name = self.place[name]
        return file.shape(stored_name)


class HfWriter:
    """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes with an index. One shard is in memory.

    The files appear under their names when `close` is called: until then their number is not known.
    """

    def __init__(self, folder: Path, max_shard_size: int = 2 * 1024**3) -> None:
        self.folder = Path(folder)
        self.max_shard_size = max_shard_size
        self.pending: dict[str, Tensor] = {}
        self.pending_size = 0
        self.total_size = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor. Its values are kept until its shard is full."""
        if self.pending and self.pending_size + tensor.nbytes > self.max_shard_size:
            self._write_shard()
        # Its own memory: safetensors refuses tensors that share theirs, and a view would keep the whole source alive.
        self.pending[name] = tensor.clone(memory_format=torch.contiguous_format)
        self.pending_size += tensor.nbytes
        self.total_size += tensor.nbytes

    def close(self) -> None:
        """Write the last shard and the index, and give the shards their names."""
        self._write_shard()
        count = len(self.shards)
        if count == 1:
            os.replace(self._unnamed(1), self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self.shards, start=1):
            file_name = f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(self._unnamed(number), self.folder / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _write_shard(self) -> None:
        self.shards.append(list(self.pending))
        save_tensors(self.pending, self._unnamed(len(self.shards)))
        self.pending = {}
        self.pending_size = 0

    def _unnamed(self, number: int) -> Path:
        return self.folder / f"model-{number:05d}.safetensors.partial"


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that whoever may read its folder may read; safetensors itself lets only the owner."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


class _SafetensorsFile:
    """One open safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({reason(error)}); download it again") from None

    def names(self) -> Iterable[str]:
        return self.file.keys()

    def tensor(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(name).get_shape())


class _BinFile:
    """One open file of torch.save, mapped into memory. Nothing in it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = load_tensors(path)

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


def _open_files(folder: Path) -> Iterator[tuple[_SafetensorsFile | _BinFile, Iterable[str]]]:
    """Every weight file of a folder and the tensors to take from it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a Hugging Face checkpoint")
    first = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if first is None:
        raise FileNotFoundError(f"{folder}: holds no weights; expected one of {', '.join(FILES)}")
    if first.suffix != ".json":
        file = _open_file(first)
        yield file, file.names()
        return
    for file_name, names in _read_index(first).items():
        file = _open_file(existing_file(folder, file_name, f"{first.name} names it; download it again"))
        held = set(file.names())
        for name in names:
            if name not in held:
                raise ValueError(f"{file.path}: has no tensor {name}, which {first.name} says is in it")
        listed = set(names)
        for name in held:
            if name not in listed:
                raise ValueError(f"{file.path}: holds {name}, which {first.name} does not say; expected it there")
        yield file, names


def _open_file(path: Path) -> _SafetensorsFile | _BinFile:
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _BinFile(path)


def _read_index(path: Path) -> dict[str, list[str]]:
    """An index's files, each with its tensors."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file_name in weight_map.items():
            if Path(file_name).name != file_name:
                raise ValueError(f"file name {file_name!r} of {name} leads out of the folder")
            files.setdefault(file_name, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of weights ({error!r})") from None
    return files
