"""A file or folder that is either whole or not there: written aside, on the disk, then renamed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_patch.files import marks
from megatron_patch.tensor_io import disk
from megatron_patch.tensor_io.disk import sync, sync_tree

MARGIN = 64 * 1024**2
"""Bytes beside the weights: tokenizer, headers, manifest, the tower's unused layer."""


def check_target(target: Path, sources: Iterable[Path] = ()) -> None:
    """Raise ValueError when `target` is anything but an empty or a new folder: nothing is overwritten.

    Nor may it be a folder whose place another cannot take (the working folder, or where a disk is mounted), or one in
    a source, or around it.
    """
    target = Path(target)
    for source in sources:
        found, own = Path(source).resolve(), target.resolve()
        if own.is_relative_to(found) or any(found.is_relative_to(place) for place in (own, partial_of(own))):
            raise ValueError(f"{target}: and {source}, which is read, lie in each other; give a folder apart from it")
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

    Raises ValueError when `target` is not empty, another process is writing it, what lies where it is written aside is
    not ours, or the disk has no room for `num_bytes`. What a killed one left is removed. The order on the disk: data,
    folder, rename, folder above.
    """
    check_target(target)
    target = Path(target).resolve()  # of a link, the folder that it leads to
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(target)
    mark, is_locked = _lock(partial, target)
    is_ours = False
    try:
        marks.claim(partial, None if is_locked else mark)
        is_ours = True
        check_space(target, num_bytes)
        disk.reached("locked")
        yield partial
        check_target(target)
        sync_tree(partial)
        disk.reached("synced")
        os.rename(partial, target)  # takes the place of an empty folder
        marks.release(target)
        disk.reached("renamed")
        sync(target.parent)
        sync(target)
    except BaseException:
        if is_ours:
            marks.discard(partial)
        raise
    finally:
        os.close(mark)


def write_whole(path: Path, text: str) -> None:
    """The file is there as a whole or not at all. Raises OSError that names it."""
    aside = marks.beside(path)
    file = aside.open("x", encoding="utf-8")  # never what is there already, nor through a link
    with removed_on_error(aside, path):
        with file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        disk.reached(f"{path.name} written")
        aside.rename(path)


@contextmanager
def removed_on_error(aside: Path, path: Path) -> Iterator[None]:
    """Have nothing left of `aside`, which is to become `path`, after an error. An OSError names `path`."""
    try:
        yield
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk, by the descriptor
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def partial_of(target: Path) -> Path:
    """Where `target` is written aside."""
    return target.parent / f".{target.name}.partial"


def _lock(partial: Path, target: Path) -> tuple[int, bool]:
    """Make `partial` this process's own: its open mark, and whether that is locked.

    The lock is in the folder itself, so that it goes away with it.
    """
    busy = f"{target}: another process is writing it; wait for that, or give another folder"
    try:
        mark = marks.open_mark(partial)
    except FileNotFoundError:  # it was renamed or removed meanwhile
        raise ValueError(busy) from None
    try:
        # Its last owner may have renamed or removed it between our opening and our locking it.
        is_locked = marks.lock(mark, partial / marks.MARK)
    except BlockingIOError:
        os.close(mark)
        raise ValueError(busy) from None
    if not is_locked:
        print(
            f"warning: {target.parent}: no locks on this file system; see that no other conversion writes {target}",
            file=sys.stderr,
        )
    return mark, is_locked
