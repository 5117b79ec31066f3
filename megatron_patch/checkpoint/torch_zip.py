"""torch.save's file format, described and written without a tensor in memory.

It is a zip archive of stored (never compressed) records: `data.pkl`, a pickle of the structure in which every tensor
stands as (storage's key, type, shape), and `data/KEY`, the bytes. So a tensor of a file is a byte range of it.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch

from megatron_patch.checkpoint import pickle_size
from megatron_patch.checkpoint.disk import BLOCK, OutputFile
from megatron_patch.checkpoint.pickle_size import Refused
from megatron_patch.checkpoint.view import Record

STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
DTYPES = {storage.__name__: dtype for dtype, storage in STORAGES.items()}

LOCAL = struct.Struct("<IHHHHHIIIHH")
CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
CRC_IN_LOCAL = 14
ZIP64 = 45  # "version needed to extract"
FIRST_DAY = 0x21  # 1980-01-01, so that the same weights give the same file
TO_BE_FOUND_IN_EXTRA = 0xFFFFFFFF


@dataclass(frozen=True)
class Stored:
    """A tensor in a file of torch.save: where its bytes lie, one after another."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    record: Record | None = field(default=None, compare=False)
    """The bytes of its storage, which other tensors may share; None where the file has no CRC-32 of them."""


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


@dataclass
class _Entry:
    """A record of the archive that is being written."""

    name: bytes
    header: int
    size: int
    crc: int = 0


def describe(file: IO[bytes], start: int = 0, skip: bool = False) -> Any:
    """What torch.load would give, with `Stored` in the place of tensors. `start`: of the archive, within a larger file.

    `skip`: `Skipped` stands in the place of any other object, and `Namespace` of argparse's; else they are an error.
    Nothing in it is executed, nor imported. Raises Refused for what nobody should read: compressed records, a structure
    whose CRC-32 differs or that is out of proportion. Raises an exception of any kind for another or a damaged file,
    for tensors whose values do not lie one after another, and for anything but tensors and plain values: torch.load has
    to say what is wrong.
    """
    records, structure = _open(file)
    return _Unpickler(io.BytesIO(structure), records, start, skip).load()


def check_archive(file: IO[bytes]) -> None:
    """Compare every record of a file of torch.save with its CRC-32. Raises as `describe` does."""
    records, _ = _open(file)
    for key, record in records.items():
        if record.crc is not None and crc_of(file, record.offset, record.size) != record.crc:
            raise Refused(f"its record {key} is not what was written (CRC-32 differs)")


def crc_of(file: IO[bytes], offset: int, size: int) -> int:
    """CRC-32 of some bytes of a file, as many of them as there are."""
    crc, left = 0, size
    file.seek(offset)
    while left > 0 and (data := file.read(min(left, 1024**2))):
        crc, left = zlib.crc32(data, crc), left - len(data)
    return crc


def _open(file: IO[bytes]) -> tuple[dict[str, Record], bytes]:
    """The records of the tensors' bytes by their keys, and the pickle that says what they are."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        raise Refused("it holds two records of one name")
    has_crc = any(entry.CRC for entry in entries)  # torch can be told to leave them out, and writes 0
    places: dict[str, Record] = {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"{entry.filename} is compressed, which torch.save never does; save it again with torch.save")
        file.seek(entry.header_offset)
        *_, name_length, extra_length = LOCAL.unpack(file.read(LOCAL.size))
        offset = entry.header_offset + LOCAL.size + name_length + extra_length
        places[entry.filename] = Record(offset, entry.file_size, entry.CRC if has_crc else None)
    pickled = next((name for name in places if name.endswith("/data.pkl")), None)
    if pickled is None:
        raise ValueError("it has no record data.pkl")
    root = pickled.removesuffix("data.pkl")
    order = places.get(root + "byteorder")  # torch writes it since 2.1, and takes little endian without
    if order is not None and _bytes(file, order, "byteorder") != b"little":
        raise ValueError("written by a machine with the other byte order")
    structure = _bytes(file, places[pickled], "its structure (data.pkl)")
    pickle_size.check(structure, "its structure (data.pkl)")
    return {name.removeprefix(root + "data/"): place for name, place in places.items()}, structure


def _bytes(file: IO[bytes], record: Record, what: str) -> bytes:
    """A small record. One that is too large for what it is, is cut off."""
    file.seek(record.offset)
    data = file.read(min(record.size, pickle_size.MAX_BYTES + 1))
    if len(data) == record.size and record.crc is not None and zlib.crc32(data) != record.crc:
        raise Refused(f"{what} is not what was written (CRC-32 differs)")
    return data


class _Unpickler(pickle.Unpickler):
    """Admits what torch.save writes for tensors, and no other name. No name is looked up in its module."""

    def __init__(self, file: IO[bytes], records: dict[str, Record], start: int, skip: bool) -> None:
        super().__init__(file)
        self.skip = skip
        self.records = records
        self.start = start

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        admitted = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): torch.Size,
        }
        if self.skip:
            admitted["argparse", "Namespace"] = Namespace
            return admitted.get((module, name), Skipped)
        if (module, name) not in admitted:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")
        return admitted[module, name]

    def persistent_load(self, saved: Any) -> tuple[Record, torch.dtype]:
        kind, dtype, key, _, count = saved
        record = self.records[key]
        if kind != "storage" or record.size < count * dtype.itemsize:
            raise pickle.UnpicklingError(f"record {key} holds {record.size} bytes, expected {count * dtype.itemsize}")
        return record._replace(offset=self.start + record.offset), dtype

    @staticmethod
    def _tensor(storage: tuple, first: int, shape: tuple, stride: tuple, *_: object) -> Stored:
        record, dtype = storage
        count = torch.Size(shape).numel()
        if count and not torch.empty(0, device="meta").as_strided(shape, stride).is_contiguous():
            raise pickle.UnpicklingError("its values do not lie one after another")
        if first < 0 or (first + count) * dtype.itemsize > record.size:
            raise pickle.UnpicklingError(f"a tensor of shape {list(shape)} goes past its record")
        offset = record.offset + first * dtype.itemsize
        return Stored(offset, dtype, tuple(shape), record if record.crc is not None else None)


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
