"""Where shards go: built aside and recorded one by one, shown when all of them are there.

`LocalOutput`, `ObjectOutput` and `NoOutput` have the same methods.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_patch.files import marks
from megatron_patch.files.names import MANIFEST
from megatron_patch.files.whole import removed_on_error, write_whole
from megatron_patch.prepare.objects import Objects, is_url
from megatron_patch.prepare.own import LOCK, PLAN, RECORDS, check_folder, check_list, lock, remove_temporary

PIECE = 1024**2


@dataclass(kw_only=True)
class ShardRecord:
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

    def __init__(self, place: str) -> None:
        self.path = _named(place)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._records = self.partial / RECORDS
        self.quarantine = f"{self.path}.rejected.tsv"
        """The list of rejected samples."""
        self.building = str(self.partial.absolute())
        """Where the shards are until they are shown, as energon takes it."""
        self._lock: int | None = None

    def begin(self, plan: dict[str, Any], overwrite: bool, *, shared: bool = False) -> None:
        """Make room, or go on with what the same plan began, to the exclusion of other conversions until `end`.

        `shared`: those of other parts of the same job apart. Raises ValueError for what is in the way.
        """
        self._check_free(overwrite)
        check_list(Path(self.quarantine))
        if not os.path.lexists(self.partial):
            self._make_partial(plan)
        self._take(shared=shared)
        if overwrite and _read_json(self._records / PLAN) != plan:
            replaced = self._aside("replaced")
            self.partial.rename(replaced)
            shutil.rmtree(replaced, ignore_errors=True)
            self._make_partial(plan)
            self._take(shared=shared)
        begun = _read_json(self._records / PLAN)
        if begun != plan:
            raise ValueError(
                f"{self.partial}: begun with another {_differing(begun, plan)}; finish it with the same, or give "
                f"--overwrite, or remove it"
            )
        self._check_free(overwrite)  # another conversion may have ended meanwhile
        if not shared:
            remove_temporary(self.partial)

    def end(self) -> None:
        """Others may begin."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_free(self, overwrite: bool) -> None:
        if os.path.lexists(self.path):
            if not overwrite:
                raise ValueError(f"{self.path}: exists; remove it or give --overwrite")
            check_folder(self.path, MANIFEST)
            if os.listdir(self.path) and "shards" not in (_read_json(self.path / MANIFEST) or ()):
                raise ValueError(f"{self.path}: its {MANIFEST} is no conversion's; move it away")

    def _take(self, *, shared: bool) -> None:
        self.end()
        check_folder(self.partial, f"{RECORDS}/{PLAN}")
        self._lock = lock(self._records / LOCK, shared=shared)

    def _aside(self, what: str) -> Path:
        """A name that nothing else has."""
        return self.path.with_name(f".{self.path.name}.{what}.{secrets.token_hex(8)}")

    def _make_partial(self, plan: dict[str, Any]) -> None:
        """With the plan in it from the first: parts of a job may begin at once, and only one of them makes it."""
        aside = self._aside("partial")
        try:
            (aside / RECORDS).mkdir(parents=True)
            write_whole(aside / RECORDS / PLAN, _to_json(plan))
            aside.rename(self.partial)
        except NotADirectoryError:
            raise ValueError(f"{self.path}: no folder can be made in what is a file; give another --output") from None
        except OSError:
            if not self.partial.exists():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def read_record(self, shard: str) -> ShardRecord | None:
        """The record of a shard that is there as it was written, else None."""
        record = _to_record(shard, _read_json(self._records / f"{shard}.json"))
        if record is not None and record.written and not _is_intact(self.partial / shard, record):
            return None
        return record

    @contextmanager
    def new_shard(self, shard: str, record: ShardRecord) -> Iterator[int]:
        """A descriptor to write the shard to. At the end the shard is there, then its record; on an error neither."""
        aside = self.partial / f"{shard}.tmp"
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _lock(descriptor, aside)
            with removed_on_error(aside, aside):
                os.ftruncate(descriptor, 0)
                yield descriptor
                os.fsync(descriptor)
                if record.written:
                    aside.rename(self.partial / shard)
                else:
                    aside.unlink()
            write_whole(self._records / f"{shard}.json", _to_json(asdict(record)))
        finally:
            os.close(descriptor)

    def list_rejected(self, lines: list[str]) -> None:
        """Write the list; no file when there is none."""
        if lines:
            write_whole(Path(self.quarantine), "".join(lines))
        else:
            Path(self.quarantine).unlink(missing_ok=True)

    def show(self, manifest: dict[str, Any]) -> None:
        """Put the folder in its place, that of an older one if need be."""
        write_whole(self.partial / MANIFEST, _to_json(manifest))
        replaced = self._aside("replaced")
        if self.path.exists():
            self.path.rename(replaced)
        try:
            self.partial.rename(self.path)
        except OSError:
            if replaced.exists():
                replaced.rename(self.path)
            raise
        for folder in (self.path / RECORDS, replaced):
            shutil.rmtree(folder, ignore_errors=True)


class ObjectOutput:
    """A URL of an object store. Nothing is renamed there: the manifest comes last, when all shards are there."""

    def __init__(self, place: str) -> None:
        self._objects = Objects(place)
        self._beside = Objects(place.rstrip("/").rpartition("/")[0])
        self.quarantine = f"{self._objects.url}.rejected.tsv"
        self.building = self._objects.msc_url()

    def begin(self, plan: dict[str, Any], overwrite: bool, *, shared: bool = False) -> None:
        """Go on with what the same plan began. Raises ValueError for what is in the way: nothing is removed there."""
        url = self._objects.url
        if overwrite:
            raise ValueError(f"{url}: --overwrite removes nothing from an object store; remove it yourself")
        if self._objects.size(MANIFEST) is not None:
            raise ValueError(f"{url}: exists; remove it, or give another --output")
        begun = _parse_json(self._objects.read(f"{RECORDS}/{PLAN}"))
        if begun not in (None, plan):
            raise ValueError(
                f"{url}: begun with another {_differing(begun, plan)}; finish it with the same, or remove it"
            )
        self._objects.write(f"{RECORDS}/{PLAN}", _to_json(plan).encode())

    def end(self) -> None:
        """A store has no locks."""

    def read_record(self, shard: str) -> ShardRecord | None:
        """The record of a shard that is there in its size, else None."""
        record = _to_record(shard, _parse_json(self._objects.read(f"{RECORDS}/{shard}.json")))
        if record is not None and record.written and self._objects.size(shard) != record.size:
            return None
        return record

    @contextmanager
    def new_shard(self, shard: str, record: ShardRecord) -> Iterator[int]:
        """A descriptor to write the shard to, in a temporary file. At the end it is uploaded, and then its record."""
        with tempfile.NamedTemporaryFile(prefix=f"{shard}.") as file:
            yield file.fileno()
            if record.written:
                self._objects.upload(shard, Path(file.name))
        self._objects.write(f"{RECORDS}/{shard}.json", _to_json(asdict(record)).encode())

    def list_rejected(self, lines: list[str]) -> None:
        """See `LocalOutput`."""
        name = self.quarantine.rpartition("/")[2]
        if lines:
            self._beside.write(name, "".join(lines).encode())
        else:
            self._beside.delete(name)

    def show(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, and remove the records."""
        self._objects.write(MANIFEST, _to_json(manifest).encode())
        for name in (PLAN, *(f"{shard}.json" for shard in manifest["shards"])):
            self._objects.delete(f"{RECORDS}/{name}")


class NoOutput:
    """Takes shards and forgets them."""

    def __init__(self, place: str) -> None:
        self.quarantine = place

    def begin(self, plan: dict[str, Any], overwrite: bool, *, shared: bool = False) -> None:
        """Nothing is in the way."""

    def end(self) -> None:
        """Nothing was begun."""

    def read_record(self, shard: str) -> None:
        """Nothing is there."""

    @contextmanager
    def new_shard(self, shard: str, record: ShardRecord) -> Iterator[int]:
        """A descriptor to write to."""
        with open(os.devnull, "wb") as file:
            yield file.fileno()

    def list_rejected(self, lines: list[str]) -> None:
        """The error says enough."""


def open_output(place: str, *, dry_run: bool) -> LocalOutput | ObjectOutput | NoOutput:
    """The output of a folder or URL."""
    if dry_run:
        return NoOutput(place)
    return ObjectOutput(place) if is_url(place) else LocalOutput(place)


def make_manifest(plan: dict[str, Any], records: list[ShardRecord]) -> dict[str, Any]:
    """What was converted how, and each shard's counts, size and CRC-32."""
    shards = {}
    for record in records:
        content = {**asdict(record), "rejected": len(record.rejected)}
        shards[content.pop("shard")] = content
    return {**plan, "shards": shards}


def _is_intact(path: Path, record: ShardRecord) -> bool:
    if not path.is_file() or path.stat().st_size != record.size:
        return False
    crc32 = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            crc32 = zlib.crc32(piece, crc32)
    return crc32 == record.crc32


def _lock(descriptor: int, path: Path) -> None:
    """Raises ValueError when another process writes the file, or has just put it in its place."""
    try:
        marks.lock(descriptor, path)
    except BlockingIOError:
        raise ValueError(f"{path}: another conversion is writing it; wait for it, or end it") from None


def _named(place: str) -> Path:
    """A folder's path with a name at its end. Raises ValueError for the root."""
    path = Path(place)
    path = path.resolve() if path.name in ("", "..") else path
    if not path.name:
        raise ValueError(f"--output {place}: expected a folder that can be made and replaced")
    return path


def _differing(begun: Any, plan: dict[str, Any]) -> str:
    begun = begun if isinstance(begun, dict) else {}
    return ", ".join(sorted(name for name in plan if begun.get(name) != plan[name]))


def _to_record(shard: str, content: Any) -> ShardRecord | None:
    """None for whatever is no record of that shard: it is written again."""
    try:
        rejected = [(int(position), str(name), str(why)) for position, name, why in content["rejected"]]
        values: dict[str, Any] = {**content, "rejected": rejected}
        record = ShardRecord(**values)
    except (TypeError, KeyError, ValueError):
        return None
    numbers = [value for name, value in asdict(record).items() if name not in ("shard", "rejected")]
    is_whole = all(type(number) is int for number in numbers) and record.given == record.written + len(rejected)
    return record if is_whole and record.shard == shard else None


def _to_json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"


def _read_json(path: Path) -> Any:
    return _parse_json(path.read_bytes() if path.is_file() else None)


def _parse_json(data: bytes | None) -> Any:
    try:
        return None if data is None else json.loads(data)
    except (ValueError, RecursionError):
        return None
