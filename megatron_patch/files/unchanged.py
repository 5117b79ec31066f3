"""Whether a source is still what it was when it was first looked at: another program may write into it meanwhile."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

READ = r".*\.(json|safetensors|bin|pt|pth|model|jinja|txt|distcp)|\.metadata"
"""Files of a source that a conversion may read. Logs and notes may grow."""

Identity = tuple[int, int, int, int]


class Unchanged:
    """Files of some folders (or single files), as they are when this is made: before the first of them is read.

    A file that is gone meanwhile is none that changed: what was read of it holds.
    """

    def __init__(self, places: Iterable[Path | None]) -> None:
        self.before: dict[Path, Identity] = {}
        for place in filter(None, places):
            names = os.listdir(place) if place.is_dir() else ()
            for path in (place, *(place / name for name in names if re.fullmatch(READ, name))):
                identity = _identity(path)
                if identity is not None:
                    self.before[path] = identity

    def check(self) -> None:
        """Raise ValueError, one line that names the file, for one that was written or replaced since."""
        for path, identity in self.before.items():
            if _identity(path) not in (identity, None):
                raise ValueError(
                    f"{path}: changed while it was read, so the result may be of two models; convert again when "
                    "nothing writes there"
                )


def _identity(path: Path) -> Identity | None:
    """Which file it is, its size and its time of change; None: no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) if path.is_file() else None
