"""What is written aside: a folder with our mark, which alone is cleared; a file's lock; nothing through a link."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import shutil
import stat
import time
import uuid
from pathlib import Path

MARK = ".written_by_megatron_patch"
"""A file in a folder that is being written aside: only what has it is cleared after a run or conversion was killed."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks says, as Lustre may be."""


def beside(path: Path) -> Path:
    """A name in the same folder that nobody else has, for what is to be renamed to `path` when it is whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def is_ours(folder: Path) -> bool:
    """Whether `folder` is one that `claim` made: no link, and with our mark."""
    try:
        return stat.S_ISDIR(folder.lstat().st_mode) and stat.S_ISREG((folder / MARK).lstat().st_mode)
    except OSError:
        return False


def claim(folder: Path, mark: int | None = None) -> None:
    """Have an empty `folder` to write aside into: a new one, or what a killed process of ours left, which is cleared.

    `release` it when it has its name, or `discard` it. `mark`: what `open_mark` gave, where it is not locked and says
    whether another process writes; None: nobody else does. Raises ValueError, and touches nothing, where another does,
    or as `open_mark`.
    """
    descriptor = open_mark(folder) if mark is None else mark
    try:
        if mark is not None and _lives(os.pread(mark, 200, 0).decode(errors="replace")):
            raise ValueError(f"{folder}: another process is writing it; wait for that, or remove what it left")
        _write_mark(descriptor, folder)
    finally:
        if mark is None:
            os.close(descriptor)
    _clear(folder)


def _write_mark(descriptor: int, folder: Path) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{platform.node()} {os.getpid()}\n".encode(), 0)
    except OSError as error:  # which names no file
        discard(folder)
        raise OSError(error.errno, error.strerror, str(folder / MARK)) from None


def open_mark(folder: Path) -> int:
    """The mark of a folder to write aside into, open, which is made where there is none.

    Raises ValueError, and touches nothing, for a link, a file, or a folder with anything that is not ours.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder}: is a link or a file, and a folder is to be written there; move it away")
    folder.mkdir(exist_ok=True)
    entries = os.listdir(folder)
    if entries and not is_ours(folder):
        raise ValueError(
            f"{folder}: holds {min(entries)!r} and no mark of this toolkit, so that nothing is removed (an earlier "
            "version, killed while it wrote, left none); move it away"
        )
    # Open for writing, without which NFS locks nothing.
    return os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def release(folder: Path) -> None:
    """Take the mark from a folder that is whole."""
    (folder / MARK).unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder that `claim` made, as far as that is possible: its mark last, so that the rest can be cleared."""
    with contextlib.suppress(OSError):
        _clear(folder)
        release(folder)
        folder.rmdir()


def _clear(folder: Path) -> None:
    for entry in os.listdir(folder):
        if entry != MARK:
            remove(folder / entry)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def lock(descriptor: int, path: Path | None = None, *, shared: bool = False, seconds: float = 0.0) -> bool:
    """Lock an open file until it is closed; `shared` locks go together. False where the file system has none.

    Raises BlockingIOError where another process has it for `seconds`, or has renamed or removed the file at `path`
    since it was opened.
    """
    is_locked = _flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, seconds)
    if path is not None:
        try:
            is_there = os.path.samestat(os.stat(path), os.fstat(descriptor))
        except FileNotFoundError:
            is_there = False
        if not is_there:
            raise BlockingIOError(f"{path}: renamed or removed")
    return is_locked


def _flock(descriptor: int, kind: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False


def check_page(path: Path, beginning: str) -> None:
    """Raise ValueError where `path` is anything but a file that begins so, or nothing: only a former page is replaced.

    Raises OSError as opening a file does.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path}: is a link, a folder or a device; give the name of a new file")
    if path.is_file():
        with path.open("rb") as file:
            found = file.read(len(beginning.encode()))
        if found and found != beginning.encode():
            raise ValueError(f"{path}: is there, and not written by this command; give the name of a new file")


def _lives(mark: str) -> bool:
    """Whether the process that wrote a mark may still be there."""
    node, _, pid = mark.strip().partition(" ")
    if not node:
        return False  # just made
    if node != platform.node() or not pid.isdecimal():
        return True  # nobody here can tell
    return int(pid) != os.getpid() and Path(f"/proc/{pid}").exists()
