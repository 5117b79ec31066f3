"""Where shards go: built aside and recorded one by one, shown when all of them are there."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PIECE = 1024**2
PLAN = "plan.json"
MANIFEST = "manifest.json"


@dataclass(kw_only=True)
class Record:
    """What became of one shard's samples: given = written + rejected."""

    shard: str
    """File name."""
    given: int
    written: int = 0
    pictures: int = 0
    picture_bytes: int = 0
    largest_picture: int = 0
    size: int = 0
    """Bytes of the tar."""
    crc32: int = 0
    """Of the tar."""
    rejected: list[tuple[int, str, str]] = field(default_factory=list)
    """Position in the json, id, why."""


class LocalOutput:
    """A folder that is built as FOLDER.partial and renamed when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.quarantine = path.with_name(path.name + ".rejected.tsv")
        self._records = self.partial / ".records"

    def begin(self, plan: dict[str, Any], overwrite: bool) -> None:
        """Make room, or go on with what the same plan began. Raises ValueError for what is in the way."""
        if self.path.exists():
            if not overwrite:
                raise ValueError(f"{self.path}: exists; remove it or give --overwrite")
            _check_only_shards(self.path)
        begun = _read_json(self._records / PLAN)
        if self.partial.exists() and begun != plan:
            if not overwrite:
                differing = sorted(name for name in plan if (begun or {}).get(name) != plan[name])
                raise ValueError(
                    f"{self.partial}: begun with another {', '.join(differing)}; finish it with the same, or give "
                    f"--overwrite, or remove it"
                )
            _check_only_shards(self.partial)
            shutil.rmtree(self.partial)
        self._records.mkdir(parents=True, exist_ok=True)
        if begun != plan:
            _write_whole(self._records / PLAN, plan)

    def read_record(self, shard: str) -> Record | None:
        """The record of a shard that is there as it was written, else None."""
        content = _read_json(self._records / f"{shard}.json")
        if content is None:
            return None
        record = Record(**{**content, "rejected": [tuple(line) for line in content["rejected"]]})
        return record if record.written == 0 or _is_intact(self.partial / shard, record) else None

    @contextmanager
    def new_shard(self, shard: str, record: Record) -> Iterator[int]:
        """A descriptor to write the shard to. At the end the shard is there, then its record; on an error neither."""
        aside = self.partial / f"{shard}.tmp"
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, aside)
            with _removed_on_error(aside):
                os.ftruncate(descriptor, 0)
                yield descriptor
                os.fsync(descriptor)
                if record.written:
                    aside.rename(self.partial / shard)
                else:
                    aside.unlink()
            _write_whole(self._records / f"{shard}.json", asdict(record))
        finally:
            os.close(descriptor)

    def show(self) -> None:
        """Put the folder in its place, that of an older one if need be."""
        replaced = self.path.with_name(f".{self.path.name}.replaced.{os.getpid()}")
        if self.path.exists():
            self.path.rename(replaced)
        try:
            self.partial.rename(self.path)
        except OSError:
            if replaced.exists():
                replaced.rename(self.path)
            raise
        for folder in (self.path / self._records.name, replaced):
            shutil.rmtree(folder, ignore_errors=True)


class NoOutput:
    """Takes shards and forgets them."""

    def __init__(self, path: Path) -> None:
        self.quarantine = path

    def begin(self, plan: dict[str, Any], overwrite: bool) -> None:
        """Nothing is in the way."""

    def read_record(self, shard: str) -> None:
        """Nothing is there."""

    @contextmanager
    def new_shard(self, shard: str, record: Record) -> Iterator[int]:
        """A descriptor to write to."""
        with open(os.devnull, "wb") as file:
            yield file.fileno()


def write_manifest(folder: Path, plan: dict[str, Any], records: list[Record]) -> None:
    """manifest.json: what was converted how, and each shard's size and CRC-32."""
    shards = {}
    for record in records:
        content = {**asdict(record), "rejected": len(record.rejected)}
        shards[content.pop("shard")] = content
    _write_whole(folder / MANIFEST, {**plan, "shards": shards})


def _is_intact(path: Path, record: Record) -> bool:
    if not path.is_file() or path.stat().st_size != record.size:
        return False
    crc32 = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            crc32 = zlib.crc32(piece, crc32)
    return crc32 == record.crc32


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk, by the descriptor
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _lock(descriptor: int, path: Path) -> None:
    """Raises ValueError when another process writes the file, or has just put it in its place."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = path.stat().st_ino == os.fstat(descriptor).st_ino
    except (BlockingIOError, FileNotFoundError):
        is_there = False
    if not is_there:
        raise ValueError(f"{path}: another conversion is writing it; wait for it, or end it")


def _check_only_shards(folder: Path) -> None:
    """Raises ValueError for a folder that holds what no conversion wrote: it must not be removed."""
    for path in folder.iterdir():
        if not re.fullmatch(r"[0-9]{5}\.tar(\.idx|\.tmp)?|\.nv-meta|\.records|manifest\.json(\..*)?", path.name):
            raise ValueError(f"{path}: not made by a conversion, so --overwrite does not remove it; remove it yourself")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _write_whole(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """The file is there as a whole or not at all."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
