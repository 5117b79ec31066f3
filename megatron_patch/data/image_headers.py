"""Whether bytes are a whole image that training can use: by their headers, or decoded."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import NamedTuple

MAX_PIXELS = 89_478_485
"""Pixels that an image may have, as it is or resized (what PIL calls a decompression bomb beyond)."""
EDGE = 336
"""Shortest edge that images are resized to, LLaVA-1.5's: what is very long and narrow becomes large then."""
DEEP = ", which transformers would show the model white; make it 8 bits"
"""What is wrong with gray of more than 8 bits: Pillow clips it."""
TAIL = 1024
"""Bytes after an image's end, of what a camera or a server appended, among which that end is looked for first."""
MAX_PASSES = 12 * MAX_PIXELS
"""Pixels times scans of a JPEG: each scan is a pass over all of them. Encoders write about ten."""

# Start of scan, and whatever ends one: in between, 0xFF is followed by 0 or by a restart marker.
_SCAN = re.compile(rb"\xff[\xda]")
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")


class Rejected(ValueError):
    """A sample that cannot be used, and why."""


def check_present(data: bytes) -> None:
    """Raises Rejected for nothing at all."""
    if not data:
        raise Rejected("empty")


def check_header(data: bytes) -> None:
    """Whether it begins and ends as an image, whatever its suffix says, and is not too large. Raises Rejected.

    Formats that are rare are decoded.
    """
    check_present(data)
    for kind in FORMATS:
        if data.startswith(kind.begin):
            break
    else:
        _check_size(*_decode(data))
        return
    if not kind.is_whole(data):
        raise Rejected("cut off")
    try:
        width, height = kind.size(data)
    except (struct.error, IndexError):
        raise Rejected("its header is damaged") from None
    _check_size(width, height)


def check_decodes(data: bytes) -> None:
    """`check_header`, and whether Pillow decodes it. Raises Rejected."""
    check_header(data)
    if data.startswith(tuple(kind.begin for kind in FORMATS)):  # else it was
        _decode(data)


def check_scans(data: bytes) -> None:
    """Raises Rejected for a JPEG that takes a small file's bytes and hours to decode; what is none passes."""
    if data.startswith(JPEG):
        _jpeg_size(data)


def kind_of(data: bytes) -> str | None:
    """What bytes seem to be that is not read, in a word or two; None: nothing known."""
    return next((kind for kind, begins in OTHERS.items() if begins.match(data)), None)


def _decode(data: bytes) -> tuple[int, int]:
    """Width and height of what Pillow decodes. Raises Rejected."""
    from megatron_patch.data.decode import decode

    try:
        return decode(data).size
    except Rejected:
        raise
    except ValueError as error:
        raise Rejected(f"cannot be decoded: {error}") from error


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise Rejected(f"{width} x {height} pixels; 1 to {MAX_PIXELS} are allowed")
    if EDGE * (EDGE * max(width, height) // min(width, height)) > MAX_PIXELS:
        raise Rejected(f"{width} x {height} pixels, more than {MAX_PIXELS} when the shortest edge becomes {EDGE}")


def _is_whole_jpeg(data: bytes) -> bool:
    """Whether its end is there: near the bytes' end, else after its scans, with a film or settings appended."""
    if data.rfind(b"\xff\xd9", -TAIL) >= 0:
        return True
    place = 2
    while found := _MARKER.search(data, place):
        marker, place = data[found.end() - 1], found.end()
        if marker == 0xD9:
            return True
        place += int.from_bytes(data[place : place + 2], "big")
    return False


def _is_whole_png(data: bytes) -> bool:
    """Whether its end is there: near the bytes' end, else after its chunks."""
    place, end = 8, b"IEND\xaeB`\x82"
    if data.rfind(end, -TAIL) >= 0:
        return True
    while place + 12 <= len(data):
        if data[place + 4 : place + 12] == end:
            return True
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return False


def _is_whole_gif(data: bytes) -> bool:
    """Whether its end is there: near the bytes' end, else after its blocks (GIF89a's appendix A)."""
    if data.rstrip(b"\0").endswith(b";"):
        return True
    if len(data) < 13:
        return False
    place = 13 + _gif_table(data[10])
    while place < len(data):
        kind = data[place]
        if kind == 0x3B:
            return True
        if kind == 0x21:  # an extension
            place += 2
        elif kind == 0x2C and place + 10 < len(data):  # an image
            place += 11 + _gif_table(data[place + 9])
        else:
            return False
        while place < len(data) and data[place]:
            place += 1 + data[place]
        place += 1
    return False


def _gif_table(flags: int) -> int:
    """Bytes of a colour table."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """From the start-of-frame segment (ITU-T T.81, annex B). Raises Rejected for what libjpeg takes hours for."""
    place = 2
    while True:
        while data[place + 1] == 0xFF:  # fill bytes
            place += 1
        marker, length = struct.unpack_from(">xBH", data, place)
        # SOF0 to SOF15, without the three of that range that define tables.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
            if bits != 8:
                raise Rejected(f"{bits} bits a value; 8 are read")
            if (len(data) - place) // 10 * width * height > MAX_PASSES:  # a scan takes 10 bytes or more
                _check_scans(data, place, marker & 3 == 2, components, width * height)
            return width, height
        if marker == 0xDA or length < 2:  # the image itself begins, and its size was not told
            raise IndexError
        place += 2 + length


def _check_scans(data: bytes, place: int, is_progressive: bool, components: int, pixels: int) -> None:
    first = _SCAN.search(data, place)
    if not is_progressive and first and data[first.end() + 2 : first.end() + 3] == bytes([components]):
        return  # one scan of all components is the whole image, whatever follows
    scans = len(_SCAN.findall(data, place))
    if scans * pixels > MAX_PASSES:
        raise Rejected(f"{scans} scans of {pixels} pixels each, more than {MAX_PASSES} pixels in all")


def _png_size(data: bytes) -> tuple[int, int]:
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    if bits == 16 and colour == 0:
        raise Rejected(f"gray of 16 bits{DEEP}")
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    """From the first chunk, which is one of three kinds (RFC 9649)."""
    if data[8:15] == b"WEBPVP8":
        if data[15:16] == b"X":
            width, height = (int.from_bytes(data[place : place + 3], "little") + 1 for place in (24, 27))
            return width, height
        if data[15:16] == b"L":
            (bits,) = struct.unpack_from("<I", data, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise IndexError


class Format(NamedTuple):
    """What tells an image's format, whether it is whole, and its width and height in pixels."""

    begin: bytes
    is_whole: Callable[[bytes], bool]
    size: Callable[[bytes], tuple[int, int]]


JPEG = b"\xff\xd8\xff"
FORMATS = (
    Format(JPEG, _is_whole_jpeg, _jpeg_size),
    Format(b"\x89PNG\r\n\x1a\n", _is_whole_png, _png_size),
    Format(b"GIF8", _is_whole_gif, lambda data: struct.unpack_from("<HH", data, 6)),
    Format(b"RIFF", lambda data: len(data) >= 8 + int.from_bytes(data[4:8], "little"), _webp_size),
)
OTHERS = {
    "HEIC": re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL),
    "AVIF": re.compile(rb"....ftypavi", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "SVG": re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<svg", re.DOTALL),
    "EPS": re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"),
    "PDF": re.compile(rb"%PDF"),
    "Photoshop's PSD": re.compile(rb"8BPS"),
}
"""Kinds that people have and that are not read: name -> how they begin."""
