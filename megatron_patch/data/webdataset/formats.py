"""Whether bytes are a whole picture that training can use: by their headers, or decoded."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import NamedTuple

from megatron_patch.data.webdataset.samples import Rejected

MAX_PIXELS = 89_478_485
"""Pixels that a picture may have, as it is or resized (what PIL calls a decompression bomb beyond)."""
EDGE = 336
"""Shortest edge that pictures are resized to, LLaVA-1.5's: what is very long and narrow becomes large then."""
TAIL = 1024
"""Bytes that may follow a picture's end: of what a camera or a server appended."""


def check_present(data: bytes) -> None:
    """Raises Rejected for nothing at all."""
    if not data:
        raise Rejected("empty")


def check_header(data: bytes) -> None:
    """Whether it begins and ends as a picture, whatever its suffix says, and is not too large. Raises Rejected."""
    check_present(data)
    for kind in FORMATS:
        if data.startswith(kind.begin):
            break
    else:
        raise Rejected("neither JPEG nor PNG, GIF, WebP")
    if not kind.is_whole(data):
        raise Rejected("cut off")
    try:
        width, height = kind.size(data)
    except (struct.error, IndexError):
        raise Rejected("its header is damaged") from None
    if not 0 < width * height <= MAX_PIXELS:
        raise Rejected(f"{width} x {height} pixels; 1 to {MAX_PIXELS} are allowed")
    if EDGE * (EDGE * max(width, height) // min(width, height)) > MAX_PIXELS:
        raise Rejected(f"{width} x {height} pixels, more than {MAX_PIXELS} when the shortest edge becomes {EDGE}")


def check_decodes(data: bytes) -> None:
    """`check_header`, and whether Pillow decodes it. Raises Rejected."""
    from PIL import Image

    check_header(data)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    except Exception as error:
        # Pillow raises OSError, SyntaxError, struct.error and others of its own for broken files.
        raise Rejected(f"cannot be decoded: {' '.join(str(error).split())}") from error


def _ends_with(end: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.rfind(end, -TAIL) >= 0


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """From the start-of-frame segment (ITU-T T.81, annex B)."""
    place = 2
    while True:
        while data[place + 1] == 0xFF:  # fill bytes
            place += 1
        marker, length = struct.unpack_from(">xBH", data, place)
        # SOF0 to SOF15, without the three of that range that define tables.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, place + 5)
            return width, height
        if marker == 0xDA or length < 2:  # the picture itself begins, and its size was not told
            raise IndexError
        place += 2 + length


def _webp_size(data: bytes) -> tuple[int, int]:
    """From the first chunk, which is one of three kinds (RFC 9649)."""
    if data[8:15] == b"WEBPVP8":
        if data[15:16] == b"X":
            return tuple(int.from_bytes(data[place : place + 3], "little") + 1 for place in (24, 27))
        if data[15:16] == b"L":
            (bits,) = struct.unpack_from("<I", data, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise IndexError


class Format(NamedTuple):
    """What tells a picture's format, whether it is whole, and its width and height in pixels."""

    begin: bytes
    is_whole: Callable[[bytes], bool]
    size: Callable[[bytes], tuple[int, int]]


FORMATS = (
    Format(b"\xff\xd8\xff", _ends_with(b"\xff\xd9"), _jpeg_size),
    Format(b"\x89PNG\r\n\x1a\n", _ends_with(b"IEND\xaeB`\x82"), lambda data: struct.unpack_from(">II", data, 16)),
    Format(b"GIF8", lambda data: data.rstrip(b"\0").endswith(b";"), lambda data: struct.unpack_from("<HH", data, 6)),
    Format(b"RIFF", lambda data: len(data) >= 8 + int.from_bytes(data[4:8], "little"), _webp_size),
)
