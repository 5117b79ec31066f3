"""A folder that is either whole or not there: built aside, locked, on the disk, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_patch.checkpoint import disk
from megatron_patch.checkpoint.disk import sync, sync_tree

MARGIN = 64 * 1024**2
"""Bytes beside the weights: tokenizer, headers, manifest, the tower's unused layer."""


def check_target(target: Path) -> None:
    """Raise ValueError when `target` is anything but an empty or a new folder: nothing is overwritten.

    Nor may it be a folder whose place another cannot take: the working folder, or where a disk is mounted.
    """
    target = Path(target)
    if target.is_dir():
        if target.samefile(Path.cwd()) or os.path.ismount(target.resolve()):
            raise ValueError(f"{target}: is the working folder or a mount point; give a new folder in it")
        if any(target.iterdir()):
            raise ValueError(f"{target}: is not empty; give a new folder, or remove what is there")
    elif target.exists() or target.is_symlink():
        raise ValueError(f"{target}: is not a folder; give a new folder")


def check_space(target: Path, num_bytes: int) -> None:
    """Raise ValueError when the disk that `target` is to be on has no room for `num_bytes`, and a little more."""
    needed = num_bytes + MARGIN
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ValueError(
            f"{target}: needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there; make room, or give a "
            "folder on another disk"
        )


@contextmanager
def written_aside(target: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A folder beside `target` to write into, renamed to `target` at the end. After an error nothing is left of it.

    Raises ValueError when `target` is not empty, another process is writing it, or the disk has no room for
    `num_bytes`. What a killed one left is removed. The order on the disk: data, folder, rename, folder above.
    """
    check_target(target)
    target = Path(target).resolve()  # of a link, the folder that it leads to
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial"
    lock = _lock(partial, target)
    try:
        for leftover in partial.iterdir():
            _remove(leftover)
        check_space(target, num_bytes)
        disk.reached("locked")
        yield partial
        check_target(target)
        sync_tree(partial)
        disk.reached("synced")
        os.rename(partial, target)  # takes the place of an empty folder
        disk.reached("renamed")
        sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock(partial: Path, target: Path) -> int:
    """Make `partial` this process's own. The lock is on the folder itself, so that it goes away with it."""
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last owner may have renamed or removed it between our opening and our locking it.
        if not partial.exists() or not os.path.samestat(os.stat(partial), os.fstat(lock)):
            raise BlockingIOError
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"{target}: another process is writing it; wait for that, or give another folder") from None
    return lock


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
