"""What a conversion may write over or remove: nothing but what carries the mark of one, and never through a link."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_patch.files import marks
from megatron_patch.files.names import MANIFEST
from megatron_patch.files.text import printable

RECORDS = ".records"
PLAN = "plan.json"
META = ".nv-meta"
LOCK = "lock"
SHARD = r"[0-9]{5}\.tar"
RANDOM = r"\.[a-z0-9_]{8}"  # as tempfile names what the object stores' client writes
TEMPORARY = re.compile(rf"\.?({SHARD}(\.idx)?|{re.escape(MANIFEST)}\..*)(\.tmp)+|{RANDOM}")
"""Files that a conversion, or energon in it, leaves only when it is killed."""
FILES = re.compile(rf"{SHARD}(\.idx)?|{re.escape(MANIFEST)}|{TEMPORARY.pattern}")
RECORD_FILES = re.compile(rf"\.?({re.escape(PLAN)}|{SHARD}\.json|{LOCK})(\..*)?")
META_FILES = re.compile(
    rf"\.?(dataset\.yaml|split\.yaml|\.info\.(json|yaml)|index\.(sqlite|uuid)(-.*)?)(\.tmp)*|{RANDOM}"
)
REJECTED = re.compile(rb"[0-9]+\t")
"""How a list of rejected samples begins."""
PATIENCE = 2.0
"""Seconds that processes of a conversion may take to end that was killed."""


def check_folder(folder: Path, mark: str) -> None:
    """Raises ValueError for a folder that is not a conversion's own: a link, without `mark`, or with other files in it.

    `mark`: a file by which it is told, such as `MANIFEST`. An empty folder passes.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder}: a link, which is not followed; remove it, or give its target as --output")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no folder that a conversion made; move it away, or give another --output")
    found = sorted(_files(folder))
    if found and not os.path.isfile(folder / mark):
        raise ValueError(f"{folder}: holds no {mark}, so no conversion made it; move it away, or give another --output")
    for path in found:
        if path.is_symlink() or not path.is_file() or not _is_named_as_ours(path.relative_to(folder)):
            raise ValueError(f"{path}: not made by a conversion, so nothing there is removed; remove it yourself")


def check_list(path: Path) -> None:
    """Raises ValueError for what is there under the name of the list of rejected samples and is none."""
    if not os.path.lexists(path):
        return
    begin = path.open("rb").read(20) if path.is_file() and not path.is_symlink() else b"another"
    if begin and not REJECTED.match(begin):
        raise ValueError(f"{path}: not a list of rejected samples, so it is not replaced; move it away")


def check_apart(output: str, folder: str, sources: list[str]) -> None:
    """Raises ValueError for an output that is or holds what is read, or lies among the images."""
    real, home = os.path.realpath(output), os.path.realpath(folder)
    for source in map(os.path.realpath, [folder, *sources]):
        if _holds(real, source) or (_holds(source, real) and not _holds(source, home) and os.path.isdir(source)):
            raise ValueError(f"--output {output}: lies in what is read, or holds it ({source}); give another folder")


def remove_temporary(folder: Path) -> None:
    """Remove what a killed conversion left in `folder`, which no other one is writing."""
    for path in _files(folder, deep=False):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def lock(path: Path, *, shared: bool) -> int:
    """A descriptor that excludes others from the folder of `path` until it is closed; `shared` ones go together.

    Raises ValueError when another conversion has it, or has just finished with it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        is_locked = marks.lock(descriptor, path, shared=shared, seconds=PATIENCE)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{path.parent.parent}: another conversion is writing it; wait for it, or end it") from None
    if not is_locked:
        print(f"{printable(path)}: no locks on this file system; do not start a second conversion", file=sys.stderr)
    return descriptor


def _files(folder: Path, *, deep: bool = True) -> Iterator[Path]:
    """All that is no folder, those of `META` and `RECORDS` included; any other folder counts as a file."""
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if deep and entry.name in (META, RECORDS) and entry.is_dir(follow_symlinks=False):
            yield from _files(path, deep=False)
        else:
            yield path


def _is_named_as_ours(path: Path) -> bool:
    kind: Any = {META: META_FILES, RECORDS: RECORD_FILES}.get(path.parts[0]) if len(path.parts) > 1 else FILES
    return bool(kind.fullmatch(path.name))


def _holds(folder: str, path: str) -> bool:
    return os.path.join(path, "").startswith(os.path.join(folder, ""))
