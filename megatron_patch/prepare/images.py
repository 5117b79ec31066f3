"""Reads images by the names that the json gives them, from folders and zip archives.

Names that lead out of the given folders are refused.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from itertools import accumulate, takewhile
from typing import NamedTuple, Protocol

from megatron_patch.config.dataset import Validation
from megatron_patch.data.image_headers import Rejected, check_decodes, check_header, check_present
from megatron_patch.prepare.objects import ObjectFile, Objects, StoreError, is_url

MAX_BYTES = 256 * 1024**2
"""Bytes that an encoded image may have."""
MAX_NAME = 1024
"""Bytes that the name of an object may have."""

# A link is followed by hand, and nothing waits at a pipe.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Root(Protocol):
    """Where names of images begin."""

    def read(self, name: str) -> bytes | None:
        """The image's bytes; None when it is not here. Raises Rejected, or OSError."""


class Images:
    """Images by name, from the first root that has them."""

    def __init__(self, roots: Sequence[Root], validate: Validation) -> None:
        self._roots = roots
        self._check = {"none": check_present, "header": check_header, "full": check_decodes}[validate]

    def read(self, name: str) -> bytes:
        """An image as it is. Raises Rejected when it is missing, damaged, or outside of the roots; StoreError."""
        try:
            data = self._find(_plain(name) if "./" in name or "//" in name else name)
            self._check(data)
        except StoreError:
            raise  # the next ones would fail as well
        except Rejected as error:
            raise Rejected(f"image {_short(name)}: {error}") from None
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
            raise Rejected(f"image {_short(name)}: {why}") from error
        return data

    def _find(self, name: str) -> bytes:
        for root in self._roots:
            data = root.read(name)
            if data is not None:
                return data
        raise Rejected("missing")


class FolderRoot:
    """A folder. `allowed`: real paths of all roots, which links may lead to."""

    def __init__(self, path: str, allowed: Sequence[str]) -> None:
        self._path = os.path.realpath(path)
        self._allowed = tuple(os.path.join(folder, "") for folder in allowed)
        self._folders: dict[str, str | None] = {}

    def read(self, name: str) -> bytes | None:
        """See `Root`."""
        parent, _, base = name.rpartition("/")
        try:
            folder = self._folders[parent]
        except KeyError:
            folder = self._folders[parent] = self._resolve(name, parent)
        if folder is None:
            return None
        if base in ("", ".", ".."):
            raise Rejected("not a file's name")
        try:
            descriptor = os.open(folder + base, _FLAGS)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            if error.errno != errno.ELOOP:
                raise
            descriptor = os.open(self._follow(folder + base), _FLAGS)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Rejected("not a file")
            if status.st_size > MAX_BYTES:
                raise Rejected(f"{status.st_size} bytes, more than {MAX_BYTES} are refused")
            data = _read(descriptor, status.st_size, 0)
            if len(data) < status.st_size:
                raise Rejected(f"{len(data)} bytes of {status.st_size} could be read")
            return data
        finally:
            os.close(descriptor)

    def _resolve(self, name: str, parent: str) -> str | None:
        """The real folder, with a slash at its end, of a name's part before the last slash; None: there is none."""
        if ".." in parent.split("/"):
            raise Rejected("leads out of the folder")
        # Of an absolute name, as in LLaVA's training, nothing is put before it.
        is_absolute = name.startswith("/")
        path = os.path.join(self._path, parent or "/" * is_absolute)
        real = self._follow(path, "an absolute name" if is_absolute else "a link")
        return os.path.join(real, "") if os.path.isdir(real) else None

    def _follow(self, path: str, what: str = "a link") -> str:
        real = os.path.realpath(path)
        if not os.path.join(real, "").startswith(self._allowed):
            raise Rejected(f"{what} that leads out of the folder; name its target with --images if it is meant")
        return real


def _read(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`; fewer at the file's end alone. FUSE and NFS may give fewer at a time."""
    data = os.pread(descriptor, size, offset)
    if 0 < len(data) < size:
        parts = [data]
        while data and (size := size - len(data)):
            offset += len(data)
            data = os.pread(descriptor, size, offset)
            parts.append(data)
        return b"".join(parts)
    return data


class LocalFile(io.FileIO):
    """A file that can also be read at any place, without moving the one that it is at."""

    def pread(self, size: int, offset: int) -> bytes:
        """At most `size` bytes at `offset`."""
        return _read(self.fileno(), size, offset)


class _Member(NamedTuple):
    offset: int
    stored: int
    size: int
    crc32: int
    method: int
    is_encrypted: bool


class ObjectRoot:
    """A URL of an object store, under which images lie by their names."""

    def __init__(self, url: str) -> None:
        self._objects = Objects(url)

    def read(self, name: str) -> bytes | None:
        """See `Root`."""
        if name.startswith("/") or ".." in name.split("/"):
            raise Rejected("leads out of the folder")
        if not name.isprintable() or len(name.encode()) > MAX_NAME:
            raise Rejected("not a name in a store")
        return self._objects.read(name)


class ZipRoot:
    """A zip archive. It is opened once: processes that are forked share its table and read at their own places."""

    def __init__(self, place: str) -> None:
        self._file = ObjectFile(place) if is_url(place) else LocalFile(place)
        self._folders = () if is_url(place) else _folders_of(place)
        try:
            with zipfile.ZipFile(self._file) as archive:
                self._members = {
                    _plain(info.filename): _Member(
                        info.header_offset,
                        info.compress_size,
                        info.file_size,
                        info.CRC,
                        info.compress_type,
                        bool(info.flag_bits & 1),
                    )
                    for info in archive.infolist()
                    if not info.is_dir()
                }
        except (OSError, MemoryError):
            raise
        except Exception as error:  # zipfile stumbles over damaged names in many ways
            raise ValueError(f"{place}: not a whole zip archive: {error}; download it again") from None
        self._prefixes = _common_folders(self._members)

    def read(self, name: str) -> bytes | None:
        """See `Root`."""
        member = self._members.get(name) or self._find(name)
        if member is None:
            return None
        if member.is_encrypted or member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Rejected("encrypted, or packed in a way other than stored and deflated")
        if max(member.size, member.stored) > MAX_BYTES:
            raise Rejected(f"{member.size} bytes, more than {MAX_BYTES} are refused")
        data = self._read_stored(name, member)
        if member.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
            except zlib.error as error:
                raise Rejected(f"damaged in the archive: {error}") from None
        if len(data) != member.size or zlib.crc32(data) != member.crc32:
            raise Rejected("damaged in the archive: wrong CRC-32")
        return data

    def _find(self, name: str) -> _Member | None:
        """Of an archive that was made of the folder itself, or of a name that begins at the root."""
        for folder in self._folders:
            if name.startswith(folder):
                name = name[len(folder) :]
                break
        names = (name, *(prefix + name for prefix in self._prefixes))
        return next((self._members[name] for name in names if name in self._members), None)

    def _read_stored(self, name: str, member: _Member) -> bytes:
        """The member's bytes as they lie there, after its own header, whose length is only written in itself."""
        guess = 30 + len(name.encode()) + 64
        data = self._file.pread(guess + member.stored, member.offset)
        if len(data) < 30 or not data.startswith(b"PK\x03\x04"):
            raise Rejected("damaged in the archive: no header")
        begin = 30 + sum(struct.unpack_from("<HH", data, 26))
        if begin <= guess:
            return data[begin : begin + member.stored]
        return self._file.pread(member.stored, member.offset + begin)


def _plain(name: str) -> str:
    """A name without the steps that lead nowhere: "./a//b" -> "a/b"."""
    return ("/" if name.startswith("/") else "") + "/".join(part for part in name.split("/") if part not in ("", "."))


def _folders_of(place: str) -> tuple[str, ...]:
    """The folder in which a file lies, as absolute names may begin, with a slash at its end."""
    path = os.path.abspath(place)
    return tuple(
        os.path.join(folder, "") for folder in (os.path.dirname(path), os.path.realpath(os.path.dirname(path)))
    )


def _common_folders(names: Iterable[str]) -> list[str]:
    """The folders that all names lie in, outermost first: "a/b/1", "a/b/2" -> "a/", "a/b/"; what macOS adds apart."""
    counted = [name for name in names if not name.startswith("__MACOSX/") and not name.endswith("/.DS_Store")]
    first, last = (name.split("/")[:-1] for name in (min(counted, default=""), max(counted, default="")))
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return list(accumulate(f"{folder}/" for folder, _ in pairs))


def _short(name: str) -> str:
    text = repr(name)
    return text if len(text) <= 200 else text[:197] + "..."


def open_roots(places: Sequence[str]) -> list[Root]:
    """A root for each folder, zip archive or URL. Raises ValueError for what is neither."""
    allowed = [os.path.realpath(place) for place in places if os.path.isdir(place)]
    roots: list[Root] = []
    for place in places:
        if os.path.isdir(place):
            roots.append(FolderRoot(place, allowed))
        elif os.path.isfile(place) or (is_url(place) and place.endswith(".zip")):
            roots.append(ZipRoot(place))
        elif is_url(place):
            roots.append(ObjectRoot(place))
        else:
            raise ValueError(f"{place}: neither a folder nor a zip archive; expected images in it")
    return roots
