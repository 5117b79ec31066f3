"""The files that torch.save writes, opened without torch.load.

A zip archive of stored (never compressed) records: `data.pkl`, a pickle of the structure in which every tensor stands
as (storage's key, type, shape), and `data/KEY`, the bytes. So a tensor of a file is a byte range of it.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import torch

from megatron_patch.tensor_io import opcodes
from megatron_patch.tensor_io.opcodes import MAX_BYTES, Refused

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
STRUCTURE = "its structure (data.pkl)"


class Record(NamedTuple):
    """Bytes of a file whose CRC-32 the file itself says. None: it says none."""

    offset: int
    size: int
    crc: int | None


@dataclass(frozen=True)
class Stored:
    """A tensor in a file of torch.save: where its bytes lie, one after another."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    record: Record | None = field(default=None, compare=False)
    """The bytes of its storage, which other tensors may share; None where the file has no CRC-32 of them."""

    def __setstate__(self, state: object) -> None:
        """A pickle cannot change what was compared with the file."""
        raise pickle.UnpicklingError("it changes where a tensor lies")


class Archive(NamedTuple):
    """What a file of torch.save is made of."""

    records: Mapping[str, Record]
    """Bytes of the tensors by their keys."""

    structure: bytes
    """The pickle that says what they are, which `opcodes.check` has found to be harmless."""


def open_archive(file: IO[bytes], most: int = MAX_BYTES) -> Archive:
    """The archive that the whole of `file` is. `most`: bytes that its structure may have.

    Raises Refused for what nobody should read: compressed records, a structure whose CRC-32 differs or that is out of
    proportion. Raises an exception of any kind for another or a damaged file.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if len({entry.filename.lower() for entry in entries}) < len(entries):  # torch finds them in either case
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
    if sum(record.size for record in places.values()) > file.seek(0, 2):
        raise Refused("its records have more bytes than the file; they overlap, or it is cut off")
    pickled = next((name for name in places if name.endswith("/data.pkl")), None)
    if pickled is None:
        raise ValueError("it has no record data.pkl")
    root = pickled.removesuffix("data.pkl")
    order = places.get(root + "byteorder")  # torch writes it since 2.1, and takes little endian without
    if order is not None and _bytes(file, order, "byteorder", most) != b"little":
        raise ValueError("written by a machine with the other byte order")
    structure = _bytes(file, places[pickled], STRUCTURE, most)
    opcodes.check(structure, STRUCTURE)
    return Archive({name.removeprefix(root + "data/"): place for name, place in places.items()}, structure)


def check_records(file: IO[bytes], archive: Archive) -> None:
    """Raise Refused unless every record has the CRC-32 that the file says."""
    for key, record in archive.records.items():
        if record.crc is not None and crc_of(file, record.offset, record.size) != record.crc:
            raise Refused(f"its record {key} is not what was written (CRC-32 differs)")


def crc_of(file: IO[bytes], offset: int, size: int) -> int:
    """CRC-32 of some bytes of a file, as many of them as there are."""
    crc, left = 0, size
    file.seek(offset)
    while left > 0 and (data := file.read(min(left, 1024**2))):
        crc, left = zlib.crc32(data, crc), left - len(data)
    return crc


def _bytes(file: IO[bytes], record: Record, what: str, most: int) -> bytes:
    """A small record."""
    if record.size > most:
        raise Refused(f"{what} has {record.size:,} bytes; expected at most {most:,} beside the tensors")
    file.seek(record.offset)
    data = file.read(record.size)
    if record.crc is not None and zlib.crc32(data) != record.crc:
        raise Refused(f"{what} is not what was written (CRC-32 differs)")
    return data


class Tensors:
    """What an unpickler asks for where a structure has tensors: gives `Stored`."""

    def __init__(self, records: Mapping[str, Record], start: int = 0) -> None:
        """`start`: of the archive, within a larger file."""
        self.records = records
        self.start = start

    def storage(self, saved: Any) -> tuple[Record, torch.dtype]:
        """The bytes that a persistent id stands for, and the type of their values."""
        kind, dtype, key, _, count = saved
        record = self.records[key]
        if kind != "storage" or record.size < count * dtype.itemsize:
            raise pickle.UnpicklingError(f"record {key} holds {record.size} bytes, expected {count * dtype.itemsize}")
        return record._replace(offset=self.start + record.offset), dtype

    @staticmethod
    def tensor(storage: tuple, first: int, shape: tuple, stride: tuple, *_: object) -> Stored:
        """What torch._utils._rebuild_tensor_v2 stands for."""
        record, dtype = storage
        if not all(type(size) is int and size >= 0 for size in (first, *shape)) or len(stride) != len(shape):
            raise pickle.UnpicklingError("a tensor has no shape")
        count = math.prod(shape)
        if count and not _is_contiguous(shape, stride):
            raise pickle.UnpicklingError("its values do not lie one after another")
        if (first + count) * dtype.itemsize > record.size:
            raise pickle.UnpicklingError(f"a tensor of shape {list(shape)} goes past its record")
        offset = record.offset + first * dtype.itemsize
        return Stored(offset, dtype, tuple(shape), record if record.crc is not None else None)


def _is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """As torch has it: an axis of one value may have any stride."""
    step = 1
    for size, width in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and width != step:
            return False
        step *= size
    return True


def check_legacy(file: IO[bytes]) -> None:
    """Raise Refused for a file of torch.save from before torch 1.6 that its five pickles, the first bytes, damn."""
    head = file.read(MAX_BYTES)
    end = 0
    for what in ("its magic number", "its version", "its types", "its structure", "its list of storages"):
        try:
            end = opcodes.check(head, what, end)
        except Refused:
            if len(head) == MAX_BYTES:
                raise Refused(f"{what} does not end in the first {MAX_BYTES:,} bytes, or is damaged") from None
            raise
