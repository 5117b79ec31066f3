"""`SHA256SUMS` beside a run's checkpoint: torch_dist does not notice a flipped bit, so every file is compared with it.

The format is coreutils': `sha256sum --check SHA256SUMS` says the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from megatron_patch.files.marks import MARK

FILE = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  ([^/\0]+)")


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name. Raises OSError."""
    found, buffer = {}, bytearray(1024**2)
    for path in map(Path, paths):
        hasher = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hasher.update(memoryview(buffer)[:count])
        found[path.name] = hasher.hexdigest()
    return found


def write(folder: Path, sums: dict[str, str]) -> None:
    """Write `folder`/SHA256SUMS for files of it."""
    (folder / FILE).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def read(folder: Path) -> dict[str, str]:
    """Names and sums. Raises ValueError or OSError, one line, for a list that is missing or damaged."""
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path}: missing; expected the list of files that the run wrote with the checkpoint")
    lines = path.read_text(errors="replace").splitlines()
    found = [match for match in map(LINE.fullmatch, lines) if match is not None]
    if not lines or len(found) < len(lines):
        raise ValueError(f"{path}: damaged; expected lines of a sha256, two spaces and a file's name")
    sums = {match[2]: match[1] for match in found}
    if len(sums) < len(lines):
        raise ValueError(f"{path}: damaged; it lists a file twice")
    return sums


def check(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Compare the files of `folder` with its list; of several processes, each takes a part that is about as large.

    Raises ValueError, one line that names the file, for one that is missing, is not listed, or is not what was written.
    """
    sums = read(folder)
    for name in sums:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing, though {FILE} lists it")
    for path in sorted(folder.iterdir()):
        # NFS keeps files under such names that somebody had open when they were removed.
        known = path.name in sums or path.name in (FILE, MARK) or path.name.startswith(".nfs")
        if not known and not path.is_dir():
            raise ValueError(f"{path}: not in {FILE}, which lists what was written; copy both again, or remove it")
    by_size = sorted(sums, key=lambda name: ((folder / name).stat().st_size, name))
    mine = by_size[part::parts]
    for name, digest in digests(folder / name for name in mine).items():
        if digest != sums[name]:
            raise ValueError(f"{folder / name}: not what was written (its sha256 is not the one in {FILE})")
