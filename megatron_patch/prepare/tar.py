"""Tar archives as energon reads them, written by hand: tarfile's own headers cost more than the images."""

from __future__ import annotations

import os
import zlib

BLOCK = 512
RECORD = 20 * BLOCK
"""A tar's length is a multiple of this."""
FLUSH = 512 * 1024
"""Bytes that are gathered for one write."""

# POSIX 1003.1-1988 (ustar): name 100, mode 8, uid 8, gid 8, size 12, mtime 12, checksum 8, type 1, link name 100,
# magic 6, version 2, owner 32, group 32, device 8 + 8, prefix 155. No time and no owner: the bytes can be made again.
_AFTER_NAME = b"0000644\0" + b"0000000\0" * 2
_MTIME = b"00000000000\0"
_AFTER_CHECKSUM = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 155 + 12)
# In the checksum, its own field counts as blanks.
_SUM = sum(_AFTER_NAME) + sum(_MTIME) + sum(b" " * 8) + sum(_AFTER_CHECKSUM)
_PADDING = [bytes(-size % BLOCK) for size in range(BLOCK)]


class TarWriter:
    """Writes members one after another. The same members give the same bytes, those of tarfile's USTAR_FORMAT."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor`: an empty file, open for writing."""
        self.crc32 = 0
        """Of all bytes that were written."""
        self.size = 0
        """Bytes that were written."""
        self._descriptor = descriptor
        self._pieces: list[bytes] = []
        self._pending = 0

    def add(self, name: str, data: bytes) -> None:
        """One file. `name`: at most 100 ASCII characters; `data`: less than 8 GiB."""
        padding = _PADDING[len(data) % BLOCK]
        self._pieces += (_header(name.encode("ascii"), len(data)), data, padding)
        self._pending += BLOCK + len(data) + len(padding)
        if self._pending >= FLUSH:
            self._flush()

    def close(self) -> None:
        """Write the end of the archive. The descriptor stays open."""
        end = self.size + self._pending + 2 * BLOCK
        self._pieces.append(bytes(2 * BLOCK + -end % RECORD))
        self._flush()

    def _flush(self) -> None:
        for piece in self._pieces:
            self.crc32 = zlib.crc32(piece, self.crc32)
        total = sum(map(len, self._pieces))
        # At most 3 pieces for every 512 bytes, so the system's limit is not far when members are small.
        for begin in range(0, len(self._pieces), 1000):
            _write(self._descriptor, self._pieces[begin : begin + 1000])
        self.size += total
        self._pieces.clear()
        self._pending = 0


def _header(name: bytes, size: int) -> bytes:
    digits = b"%011o\0" % size
    checksum = _SUM + sum(name) + sum(digits)
    return b"".join((name.ljust(100, b"\0"), _AFTER_NAME, digits, _MTIME, b"%06o\0 " % checksum, _AFTER_CHECKSUM))


def _write(descriptor: int, pieces: list[bytes]) -> None:
    written = os.writev(descriptor, pieces)
    rest = sum(map(len, pieces)) - written
    if rest:  # a disk that fills up takes a part first and then says so
        left = memoryview(b"".join(pieces))[written:]
        while left:
            left = left[os.write(descriptor, left) :]
