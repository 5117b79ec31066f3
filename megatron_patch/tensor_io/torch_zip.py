"""Files of torch.save, described and written without a tensor in memory."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch

from megatron_patch.tensor_io.archives import DTYPES, LOCAL, STORAGES, Archive, Stored, Tensors
from megatron_patch.tensor_io.disk import BLOCK, OutputFile
from megatron_patch.tensor_io.pickles import build, refused

CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
CRC_IN_LOCAL = 14
ZIP64 = 45  # "version needed to extract"
FIRST_DAY = 0x21  # 1980-01-01, so that the same weights give the same file
TO_BE_FOUND_IN_EXTRA = 0xFFFFFFFF


class Skipped:
    """What stands for an object of a class that is not admitted. It keeps nothing of what the file says about it."""

    def __new__(cls, *arguments: object) -> Skipped:
        return super().__new__(cls)

    def _ignore(self, *arguments: object) -> Skipped:
        return self

    # All that a pickle asks of an object.
    __call__ = __setstate__ = __setitem__ = append = extend = _ignore


class Namespace(dict):
    """What stands for an argparse.Namespace, in which Megatron-LM saves its settings."""

    def __setstate__(self, state: dict) -> None:
        self.update(state)


class Ordered(OrderedDict):
    """What stands for an OrderedDict. Attributes of one, as a module's state dict has, are left out."""

    def __setstate__(self, state: object) -> None:
        pass


@dataclass
class _Entry:
    """A record of the archive that is being written."""

    name: bytes
    header: int
    size: int
    crc: int = 0


def describe(archive: Archive, start: int = 0, skip: bool = False) -> Any:
    """What torch.load would give, with `Stored` in the place of tensors. `start`: of the archive, within a larger file.

    `skip`: `Skipped` stands in the place of any other object, and `Namespace` of argparse's; else they are an error.
    Nothing in it is executed, nor imported. Raises an exception of any kind for damaged bytes, for tensors whose values
    do not lie one after another, and for anything but tensors and plain values: torch.load has to say what is wrong.
    """
    tensors = Tensors(archive.records, start)
    admitted: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): tensors.tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("collections", "OrderedDict"): Ordered,
        ("torch", "Size"): torch.Size,
    }
    if skip:
        admitted["argparse", "Namespace"] = Namespace

    def find(module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if not skip and (module, name) not in admitted:
            raise refused(module, name)
        return admitted.get((module, name), Skipped)

    return build(archive.structure, find, tensors.storage)


def _parameter(data: object, *_: object) -> object:
    if not isinstance(data, Stored | Skipped):
        raise pickle.UnpicklingError("a parameter is no tensor")
    return data


class TorchArchive:
    """Writes what torch.load(weights_only=True) reads, the bytes of its tensors in any order.

    It is a file of its own (then mmap=True reads it too) or a piece of one, as in a `.distcp` file. The place of every
    tensor is known at once, and begins at a multiple of 4096 bytes for direct I/O. What makes an archive of it, the
    directory at its end, comes last: one that was not finished does not load.
    """

    def __init__(self, file: OutputFile, content: Any, start: int = 0) -> None:
        """`content`: plain values, and meta tensors for those to be written. `start`: a multiple of 4096."""
        self.file = file
        self.start = start
        self.entries: list[_Entry] = []
        self.tensors: list[_Entry] = []
        self.offsets: list[int] = []
        """Where in `file` the bytes of each tensor go, in the order in which they stand in `content`."""
        self.end = start
        """End of the tensors, where the directory begins."""
        pickled, sizes = _pickle(content)
        self._record("archive/data.pkl", pickled)
        self._record("archive/byteorder", b"little")
        for key, size in enumerate(sizes):
            entry, offset = self._begin(f"archive/data/{key}", size)
            self.tensors.append(entry)
            self.offsets.append(offset)
        self._record("archive/version", b"3\n")

    @property
    def size(self) -> int:
        """Bytes of the whole archive."""
        return self.end - self.start + len(self._directory())

    def finish(self, crcs: Sequence[int]) -> None:
        """Complete it with the CRC32 of every tensor."""
        for entry, crc in zip(self.tensors, crcs, strict=True):
            entry.crc = crc
            self.file.write(self.start + entry.header + CRC_IN_LOCAL, struct.pack("<I", crc))
        self.file.write(self.end, self._directory())

    def _directory(self) -> bytes:
        return _directory(self.entries, self.end - self.start)

    def _record(self, name: str, data: bytes) -> None:
        entry, offset = self._begin(name, len(data), zlib.crc32(data))
        self.file.write(offset, data)
        assert entry.size == len(data)

    def _begin(self, name: str, size: int, crc: int = 0) -> tuple[_Entry, int]:
        """A record's header, with filling so that the data after it begins at a block. Returns where that is."""
        entry = _Entry(name.encode(), self.end - self.start, size, crc)
        sizes = struct.pack("<HHQQ", 1, 16, size, size)
        filling = -(self.end + LOCAL.size + len(entry.name) + len(sizes) + 4) % BLOCK
        extra = sizes + struct.pack("<2sH", b"FB", filling) + b"Z" * filling  # as torch fills
        large = TO_BE_FOUND_IN_EXTRA
        fixed = (0x04034B50, ZIP64, 0, 0, 0, FIRST_DAY, crc, large, large, len(entry.name), len(extra))
        header = LOCAL.pack(*fixed) + entry.name + extra
        self.file.write(self.end, header)
        self.entries.append(entry)
        offset = self.end + len(header)
        self.end = offset + size
        return entry, offset


def _directory(entries: Sequence[_Entry], position: int) -> bytes:
    """The zip's central directory, zip64 throughout, as it stands at `position`."""
    large = TO_BE_FOUND_IN_EXTRA
    directory = b""
    for entry in entries:
        extra = struct.pack("<HHQQQ", 1, 24, entry.size, entry.size, entry.header)
        fixed = (0x02014B50, ZIP64, ZIP64, 0, 0, 0, FIRST_DAY, entry.crc, large, large, len(entry.name), len(extra))
        directory += CENTRAL.pack(*fixed, 0, 0, 0, 0, large) + entry.name + extra
    count, size = len(entries), len(directory)
    end64 = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, ZIP64, ZIP64, 0, 0, count, count, size, position)
    locator = struct.pack("<IIQI", 0x07064B50, 0, position + size, 1)
    few = min(count, 0xFFFF)
    return directory + end64 + locator + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, few, few, large, large, 0)


@dataclass
class _Storage:
    """What stands for a tensor's bytes in a pickle."""

    key: str
    dtype: torch.dtype
    count: int


class _Pickler(pickle.Pickler):
    """Writes meta tensors as torch.save writes tensors: each is a storage of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=2)
        self.sizes: list[int] = []

    def persistent_id(self, value: Any) -> tuple | None:
        if isinstance(value, _Storage):
            return "storage", STORAGES[value.dtype], value.key, "cpu", value.count
        return None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        storage = _Storage(str(len(self.sizes)), value.dtype, value.numel())
        self.sizes.append(value.nbytes)
        shape = tuple(value.shape)
        stride = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, stride, False, OrderedDict())


def _pickle(content: Any) -> tuple[bytes, list[int]]:
    """The pickle, and the bytes of each of its storages in the order of their keys."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    return buffer.getvalue(), pickler.sizes


def frame(size: int, tensors: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, length) of all that is not tensors in a file of `size` bytes, given where these lie."""
    gaps, end = [], 0
    for offset, length in [*sorted(tensors), (size, 0)]:
        if offset > end:
            gaps.append((end, offset - end))
        end = max(end, offset + length)
    return gaps
