"""Bytes from and to the disk, past the kernel's page cache where the file system allows it, and onto it for good.

A model passes once and is not needed again: copying it through the page cache costs as much time as the disk takes.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path

BLOCK = 4096
"""What O_DIRECT wants offsets, lengths and addresses to be multiples of."""

SMALL = 64 * 1024
"""Reads below this go through the page cache: their neighbours are wanted next."""

NOT_OF_FOLDERS = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)
"""How network file systems answer when a folder is to be on the disk: they write its entries when they can."""

DIRECT = getattr(os, "O_DIRECT", 0)


def reached(point: str) -> None:
    """Named moments of a conversion, where tests kill it. Does nothing."""


def aligned_buffer(size: int) -> memoryview:
    """Memory whose address is a multiple of `BLOCK`. It is not there until it is written to."""
    memory = mmap.mmap(-1, blocks(size))
    if hasattr(mmap, "MADV_HUGEPAGE"):  # the kernel handles each page of a direct read or write
        with suppress(OSError):  # of a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def blocks(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


class InputFile:
    """A file that is read in large pieces. Raises OSError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plain = os.open(path, os.O_RDONLY)
        self.direct = _open_direct(path, os.O_RDONLY)

    def read(self, offset: int, length: int, buffer: memoryview) -> memoryview:
        """`length` bytes from `offset` on. They lie somewhere in `buffer`, which has 2 blocks more room than that."""
        lead = offset % BLOCK
        wanted = lead + length
        space = buffer[: blocks(wanted)]
        descriptor = self.plain if length < SMALL or self.direct is None else self.direct
        done = 0
        while done < wanted:
            # What is left stays aligned unless the file ended, and then there is nothing left.
            count = self._preadv(descriptor, space[done:], offset - lead + done)
            if count == 0:
                raise ValueError(f"{self.path}: ends before byte {offset + length}; copy or convert it again")
            done += count
        return space[lead:wanted]

    def close(self) -> None:
        """Let go of the file."""
        for descriptor in (self.plain, self.direct):
            if descriptor is not None:
                os.close(descriptor)

    def _preadv(self, descriptor: int, space: memoryview, offset: int) -> int:
        try:
            return os.preadv(descriptor, [space], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or descriptor == self.plain:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            return os.preadv(self.plain, [space], offset)


class OutputFile:
    """A new file that is written at known offsets. Raises OSError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plain = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self.direct = _open_direct(path, os.O_RDWR)

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Put bytes at `offset`: whole blocks of aligned memory directly, what is left through the page cache."""
        done = 0
        if self.direct is not None and offset % BLOCK == 0 and isinstance(data, memoryview):
            done = self._write_direct(self.direct, offset, data[: len(data) // BLOCK * BLOCK])
        while done < len(data):
            done += self._pwrite(self.plain, data[done:], offset + done)
        reached("bytes written")

    def resize(self, size: int) -> None:
        """Make the file `size` bytes long; what was not written reads as zeros."""
        try:
            os.ftruncate(self.plain, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def sync(self) -> None:
        """Have it on the disk."""
        try:
            os.fsync(self.plain)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def close(self) -> None:
        """Let go of the file."""
        for descriptor in (self.plain, self.direct):
            if descriptor is not None:
                os.close(descriptor)

    def _write_direct(self, descriptor: int, offset: int, data: memoryview) -> int:
        done = 0
        while done < len(data):
            try:
                count = self._pwrite(descriptor, data[done:], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL:  # the file system opened it so, and wants larger blocks
                    return done
                raise
            done += count // BLOCK * BLOCK
            if count % BLOCK:
                return done
        return done

    def _pwrite(self, descriptor: int, data: memoryview | bytes, offset: int) -> int:
        try:
            return os.pwrite(descriptor, data, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def sync(path: Path) -> None:
    """Have a file or a folder's entries on the disk; of a folder, as far as the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_OF_FOLDERS or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have a folder with all that is in it on the disk: files before the folders that name them."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))


def _open_direct(path: Path, flags: int) -> int | None:
    """A descriptor past the page cache, None where there is no such thing."""
    if not DIRECT:
        return None
    try:
        return os.open(path, flags | DIRECT)
    except OSError:
        return None
