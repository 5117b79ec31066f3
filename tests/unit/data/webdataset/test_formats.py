"""Which pictures are whole: those that Pillow writes, and nothing that was cut off or is too large."""

import io
import struct
import zlib

import pytest
from PIL import Image

from megatron_patch.data.webdataset.formats import FORMATS, check_decodes, check_header
from megatron_patch.data.webdataset.samples import Rejected


def encode(kind, mode="RGB", size=(37, 19), **options):
    file = io.BytesIO()
    Image.effect_noise(size, 90).convert(mode).save(file, kind, **options)
    return file.getvalue()


frames = [Image.new("L", (37, 19), shade) for shade in (1, 99, 200)]
WHOLE = {
    "jpeg": encode("JPEG"),
    "progressive jpeg": encode("JPEG", progressive=True),
    "gray jpeg": encode("JPEG", "L"),
    "cmyk jpeg": encode("JPEG", "CMYK"),
    "jpeg with exif": encode("JPEG", exif=b"Exif\0\0" + bytes(40)),
    "png": encode("PNG"),
    "16 bit png": encode("PNG", "I;16"),
    "palette png": encode("PNG", "P"),
    "gif": encode("GIF"),
    "animated gif": encode("GIF", "L", save_all=True, append_images=frames),
    "lossy webp": encode("WEBP"),
    "lossless webp": encode("WEBP", lossless=True),
    "animated webp": encode("WEBP", save_all=True, append_images=[frame.convert("RGB") for frame in frames]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_pictures_of_every_kind(name):
    data = WHOLE[name]
    (kind,) = [kind for kind in FORMATS if data.startswith(kind.begin)]
    assert tuple(kind.size(data)) == (37, 19)
    for check in (check_header, check_decodes):
        check(data)
        check(data + bytes(10))
    for part in (0, 1, 13, len(data) // 2, len(data) - 12):
        for check in (check_header, check_decodes):
            with pytest.raises(Rejected):
                check(data[:part])


@pytest.mark.parametrize("check", [check_header, check_decodes])
@pytest.mark.parametrize(
    "data", [b"", b"<html>not found</html>", b"\xff\xd8\xff\xd9", b"RIFFxxxxWAVE", b"\xff\xd8" * 99]
)
def test_what_is_no_picture(check, data):
    with pytest.raises(Rejected):
        check(data)


@pytest.mark.parametrize("check", [check_header, check_decodes])
def test_400_megapixels_are_refused_by_their_header(check, monkeypatch):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(2501 * 20_000)))
        + chunk(b"IEND", b"")
    )
    assert len(bomb) < 100_000
    monkeypatch.setattr(Image, "open", lambda file: pytest.fail("decoded"))
    with pytest.raises(Rejected, match="20000 x 20000 pixels"):
        check(bomb)


@pytest.mark.parametrize("size", [(1, 12_000), (12_000, 1)])
def test_what_becomes_too_large_when_it_is_resized(size):
    with pytest.raises(Rejected, match="more than 89478485 when the shortest edge becomes 336"):
        check_header(encode("PNG", size=size))


def test_damage_inside_is_found_by_decoding_alone():
    data = WHOLE["png"]
    middle = len(data) // 2
    data = data[:middle] + bytes(20) + data[middle + 20 :]
    check_header(data)
    with pytest.raises(Rejected, match="cannot be decoded"):
        check_decodes(data)
