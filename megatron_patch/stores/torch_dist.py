"""megatron.core's distributed checkpoints (format torch_dist), read without processes and without megatron.core.

A folder holds `.metadata` (which tensor's which block lies where) and `*.distcp` files (the blocks). TransformerBlock
stacks its layers: `decoder.layers.mlp.linear_fc1.weight` has a leading axis of layers. fc1 of a gated MLP is stored as
[gate; up], as the table's whole tensor is. Norms lie under Transformer Engine's names, the vocabulary padded.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron_patch.families.fused_names import to_local_name, to_transformer_engine_name
from megatron_patch.families.table import Weight
from megatron_patch.files.names import RUN_CONFIG
from megatron_patch.stores import checksums, manifest
from megatron_patch.stores.reader import Reader, existing_file, reason, stored_view
from megatron_patch.tensor_io.archives import Stored, open_archive
from megatron_patch.tensor_io.pickles import admitting, unpickle
from megatron_patch.tensor_io.torch_zip import describe
from megatron_patch.tensor_io.view import View

LAYERS = ".decoder.layers."
LAYER = re.compile(r"(.*\.decoder\.layers\.)(\d+)\.(.*)")

# What torch.distributed.checkpoint and megatron.core write into `.metadata`. These only hold values.
ADMITTED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    # megatron.core keeps every rank's plan of what it wrote.
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int32", "int64", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
}


class TorchDistReader(Reader):
    """Whole, unpadded tensors under the local spec's names and global layer indices.

    Optimizer states and other objects beside the model are left out. `rows` is the model's table. `check`: compare what
    is read with the converter's `manifest.json`, or all files with a run's `SHA256SUMS`. Raises ValueError or
    FileNotFoundError, one line that names the file, for a checkpoint that is incomplete, damaged or carries code.
    """

    def __init__(self, folder: Path, rows: Iterable[Weight], check: bool = True) -> None:
        self.folder = Path(folder)
        self.source = str(folder)
        self.rows = {weight.mcore: weight for weight in rows}
        self.check = check
        # A run's has sums, which may have been lost on the way.
        if check and any((self.folder / name).exists() for name in (checksums.FILE, RUN_CONFIG)):
            checksums.check(self.folder)
        records = (manifest.read(self.folder) if check else None) or {}
        for record in records.values():
            path = existing_file(self.folder, record.file, f"{manifest.FILE} names it; copy the checkpoint again")
            manifest.check_size(path, record)
            if not record.tensors:
                manifest.check_rank(path, record, {})
        self.metadata = read_metadata(existing_file(self.folder, ".metadata", "expected a torch_dist checkpoint"))
        # Name -> the stored key and the layer to take of it (None: all of it).
        self.place: dict[str, tuple[str, int | None]] = {}
        self.tensors = model_tensors(self.metadata)
        for key, stored in self.tensors.items():
            if LAYERS in key and not LAYER.fullmatch(key):
                for layer in range(stored.size[0]):
                    self.place[to_local_name(key.replace(LAYERS, f"{LAYERS}{layer}."))] = (key, layer)
            else:
                self.place[to_local_name(key)] = (key, None)
        # Key and offsets of a block -> (rows, sha256) of its runs.
        self.digests: dict[tuple[str, torch.Size], list[tuple[int, str]]] = {}
        for record in records.values():
            if record.tensors:
                self._check_tensors(record)

    def view(self, name: str) -> View:
        """Where one tensor's values lie."""
        key, layer = self.place[name]
        stored = self.tensors[key]
        shape = self.shape(name)
        wanted = shape if layer is None else (1, *shape)
        start = (0,) * len(wanted) if layer is None else (layer, *(0,) * len(shape))
        # First row -> first column -> what a block gives of the tensor.
        grid: dict[int, dict[int, View]] = {}
        filled = 0
        for block in stored.chunks:
            overlap = _overlap(start, wanted, tuple(block.offsets), tuple(block.sizes))
            if overlap is None:
                continue
            target, source = overlap
            whole = self._block(key, block.offsets, block.sizes, layer is not None)
            if layer is not None:
                rows = block.sizes[1]
                whole = whole.narrow(0, source[0].start * rows, rows)
                target, source = target[1:], source[1:]
            part = _narrowed(whole, source)
            column = target[1].start if len(target) > 1 else 0
            grid.setdefault(target[0].start, {})[column] = part
            filled += part.rows * part.columns
        if filled != math.prod(shape):
            raise ValueError(f"{self.folder}: the blocks of {key} hold {filled} of its {math.prod(shape)} values")
        return View.cat([_beside([row[left] for left in sorted(row)]) for _, row in sorted(grid.items())])

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)

    def shape(self, name: str) -> tuple[int, ...]:
        key, layer = self.place[name]
        size = tuple(self.tensors[key].size)
        shape = size if layer is None else size[1:]
        weight = self.rows.get(name)
        if weight is not None and weight.layout == "vocab":
            return (min(shape[0], weight.shape[0]), *shape[1:])
        return shape

    def _check_tensors(self, record: manifest.RankRecord) -> None:
        """Compare a file of blocks with its record, and keep the digests for when they are read."""
        found = {}
        for name in record.tensors.keys() & self.place.keys():
            key, layer = self.place[name]
            size = self.tensors[key].size
            sizes = size if layer is None else torch.Size((1, *size[1:]))
            offsets = torch.Size((layer or 0, *(0 for _ in size[1:])))
            _, stored = self._stored(key, offsets, sizes)
            shape = list(sizes if layer is None else sizes[1:])
            found[name] = (
                manifest.dtype_name(stored.dtype),
                shape,
                stored.offset,
                math.prod(shape) * stored.dtype.itemsize,
            )
            runs = zip(record.tensors[name].rows, record.tensors[name].sha256, strict=True)
            self.digests[key, offsets] = list(runs)
        manifest.check_rank(self.folder / record.file, record, found)

    def _block(self, key: str, offsets: torch.Size, sizes: torch.Size, is_stacked: bool) -> View:
        """The plan of one block; of stacked layers, the rows of one after the other's."""
        path, stored = self._stored(key, offsets, sizes)
        if is_stacked:
            stored = replace(stored, shape=(sizes[0] * sizes[1], *sizes[2:]))
        view = stored_view(path, f"{key} at {list(offsets)}", stored, self.digests.get((key, offsets), ()))
        return view if self.check else view.unchecked()

    def _stored(self, key: str, offsets: torch.Size, sizes: torch.Size) -> tuple[Path, Stored]:
        """Where one block lies."""
        where = self.metadata.storage_data.get(MetadataIndex(key, offsets))
        if where is None:
            raise ValueError(f"{self.folder}/.metadata: does not say where the block of {key} at {list(offsets)} lies")
        path = self.folder / where.relative_path
        if Path(where.relative_path).name != where.relative_path:
            raise ValueError(f"{self.folder}/.metadata: {key} lies in {where.relative_path!r}, out of the folder")
        existing_file(self.folder, where.relative_path, f"it holds {key}; copy the checkpoint again")
        try:
            with Window(path, where.offset, where.length) as file:
                block = describe(open_archive(cast("IO[bytes]", file)), where.offset)
        except Exception as error:  # damaged bytes make zipfile and pickle raise nearly anything
            raise ValueError(f"{path}: {key} at {list(offsets)} is not readable ({reason(error)})") from error
        if not isinstance(block, Stored) or block.shape != tuple(sizes):
            shape = list(getattr(block, "shape", ()))
            raise ValueError(f"{path}: {key} at {list(offsets)} has shape {shape}, expected {list(sizes)}")
        return path, block


class Window(io.RawIOBase):
    """Some bytes of a file, as a file: every block is an archive of torch.save."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self.file = path.open("rb")
        self.start, self.length, self.position = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any, /) -> int:  # bytes to write to
        self.file.seek(self.start + self.position)
        data = self.file.read(max(0, min(len(buffer), self.length - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _beside(parts: list[View]) -> View:
    return View.cat(parts, 1) if len(parts) > 1 else parts[0]


def _narrowed(block: View, box: tuple[slice, ...]) -> View:
    """A box of a block."""
    for axis, part in enumerate(box):
        if (part.start, part.stop) != (0, block.shape[axis]):
            block = block.narrow(axis, part.start, part.stop - part.start)
    return block


def model_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The stored tensors that are the model's own: no optimizer states, no other objects."""
    entries = metadata.state_dict_metadata.items()
    return {k: v for k, v in entries if isinstance(v, TensorStorageMetadata) and not k.startswith("optimizer.")}


def stored_key(name: str) -> tuple[str, int | None]:
    """The key under which megatron.core saves a parameter, norms fused; and its index along the axis of layers."""
    name = to_transformer_engine_name(name)
    match = LAYER.fullmatch(name)
    return (f"{match[1]}{match[3]}", int(match[2])) if match else (name, None)


def read_metadata(path: Path) -> Metadata:
    """A `.metadata` file. Raises ValueError when it is damaged or names anything that is not a value of it."""
    try:
        metadata = unpickle(path.read_bytes(), admitting(ADMITTED))
        if isinstance(metadata, Metadata):
            _check_metadata(metadata)
    except Exception as error:  # damaged bytes make pickle raise nearly anything
        raise ValueError(f"{path}: not the metadata of a torch_dist checkpoint ({reason(error)})") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path}: holds a {type(metadata).__name__}, not the metadata of a torch_dist checkpoint")
    return metadata


def _check_metadata(metadata: Metadata) -> None:
    """Raise ValueError, TypeError or AttributeError where its parts are not what their types say.

    A pickle puts anything anywhere.
    """
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(stored, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError(f"{key!r} is a {type(stored).__name__}")
        if isinstance(stored, BytesStorageMetadata):
            continue
        if not isinstance(stored.properties.dtype, torch.dtype):
            raise ValueError(f"{key} has no type")
        for sizes in (stored.size, *(part for block in stored.chunks for part in (block.offsets, block.sizes))):
            if len(sizes) != len(stored.size) or not all(isinstance(size, int) and size >= 0 for size in sizes):
                raise ValueError(f"{key} has a shape or a block of {list(sizes)[:8]}")
    for index, where in metadata.storage_data.items():
        if not isinstance(index.fqn, str) or not isinstance(where.relative_path, str):
            raise ValueError("it names no file for a block")
        if not all(isinstance(number, int) and 0 <= number < 2**62 for number in (where.offset, where.length)):
            raise ValueError(f"{index.fqn} lies at {where.offset!r}, {where.length!r} bytes")


def _overlap(
    start: tuple[int, ...], shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a stored block meets the wanted box: in the box's and in the block's own coordinates; None: nowhere."""
    target, source = [], []
    for begin, length, offset, size in zip(start, shape, offsets, sizes, strict=True):
        first, last = max(begin, offset), min(begin + length, offset + size)
        if first >= last:
            return None
        target.append(slice(first - begin, last - begin))
        source.append(slice(first - offset, last - offset))
    return tuple(target), tuple(source)
