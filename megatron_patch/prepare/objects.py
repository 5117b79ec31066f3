"""Object stores (`s3://`, `gs://`, profiles as `msc://`) through multi-storage-client, which energon brings."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

URL = re.compile(r"[a-z0-9]+://")


class StoreError(OSError):
    """A store cannot be reached, or refuses: no fault of what is read or written."""


def is_url(place: str) -> bool:
    """Whether a place is in an object store."""
    return bool(URL.match(place))


class Objects:
    """What lies under one URL. Raises StoreError that names it; a process that is forked opens its own connection."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with _named(self.url):
            self._client()

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes | None:
        """The bytes, or a range of them; None when there is no such object."""
        from multistorageclient.types import Range

        with _named(self._at(name)):
            client, path = self._client(name)
            try:
                return client.read(path, None if size is None else Range(offset, size))
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        """In bytes; None when there is no such object."""
        with _named(self._at(name)):
            client, path = self._client(name)
            try:
                return client.info(path).content_length
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """The object is there as a whole or not at all."""
        with _named(self._at(name)):
            client, path = self._client(name)
            client.write(path, data)

    def upload(self, name: str, path: Path) -> None:
        """Write a local file."""
        with _named(self._at(name)):
            client, remote = self._client(name)
            client.upload_file(remote, str(path))

    def delete(self, name: str) -> None:
        """Gone, whether it was there or not."""
        with _named(self._at(name)):
            client, path = self._client(name)
            with suppress(FileNotFoundError):
                client.delete(path)

    def msc_url(self) -> str:
        """The URL as energon takes it."""
        client, path = self._client()
        return f"msc://{client.profile}/{path}"

    def _at(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _client(self, name: str = "") -> tuple[Any, str]:
        import multistorageclient

        return multistorageclient.resolve_storage_client(self._at(name))


class ObjectFile(io.RawIOBase):
    """One object as a file that can be read and sought in, as zipfile wants it."""

    def __init__(self, url: str) -> None:
        self._objects, self._place = Objects(url), 0
        size = self._objects.size("")
        if size is None:
            raise ValueError(f"{url}: missing")
        self._size = size

    def pread(self, size: int, offset: int) -> bytes:
        """At most `size` bytes at `offset`."""
        size = min(size, self._size - offset)
        return (self._objects.read("", offset, size) or b"") if size > 0 else b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def tell(self) -> int:
        """As of any file."""
        return self._place

    def read(self, size: int = -1) -> bytes:
        """As of any file."""
        data = self.pread(self._size if size < 0 else size, self._place)
        self._place += len(data)
        return data


@contextmanager
def _named(url: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{url}: {error.name} is not installed; install it with: pip install -c constraints.txt -e '.[s3]'"
        ) from None
    except Exception as error:
        # The client raises RuntimeError, ValueError and what its providers raise.
        raise StoreError(f"{url}: {' '.join(str(error).split())[:400]}") from error
