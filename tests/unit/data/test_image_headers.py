"""Which images are whole: those that Pillow writes, and nothing that was cut off or is too large."""

import io
import struct
import time
import zlib

import pytest
from PIL import Image

from megatron_patch.data.decode import decode
from megatron_patch.data.image_headers import FORMATS, Rejected, check_decodes, check_header


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
        check(data + b"film " * 1000)  # as telephones append
    for part in (0, 1, 13, len(data) // 2, len(data) - 12):
        for check in (check_header, check_decodes):
            with pytest.raises(Rejected):
                check(data[:part])


def test_the_end_of_a_thumbnail_is_not_the_pictures():
    thumbnail = encode("JPEG", size=(9, 9))
    data = encode("JPEG", size=(200, 200), exif=b"Exif\0\0" + thumbnail)
    assert data.count(b"\xff\xd9") == 2
    check_header(data + bytes(5000))
    with pytest.raises(Rejected, match="cut off"):
        check_header(data[:-2] + bytes(5000))


def with_scans(count, size, *, progressive=True):
    """The last scan again and again: 24 bytes each, or a component's own of a baseline JPEG."""
    file = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(file, "JPEG", progressive=progressive, quality=10)
    data = file.getvalue()
    begin = data.rfind(b"\xff\xda")
    scan = data[begin:-2] if progressive else b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + bytes(2)
    return (data[:-2] if progressive else data[:begin]) + scan * count + b"\xff\xd9"


@pytest.mark.parametrize("progressive", [True, False])
def test_hundreds_of_scans_of_a_large_picture_are_refused(progressive):
    data = with_scans(400, (3000, 3000), progressive=progressive)
    assert len(data) < 200_000
    begin = time.monotonic()
    for check in (check_header, check_decodes, decode):
        with pytest.raises(ValueError, match="scans of 9000000 pixels each, more than"):
            check(data)
    assert time.monotonic() - begin < 1
    check_decodes(with_scans(20, (300, 300)))


def test_a_jpeg_of_12_bits_is_refused():
    data = WHOLE["jpeg"]
    place = data.index(b"\xff\xc0") + 4
    with pytest.raises(Rejected, match="12 bits a value; 8 are read"):
        check_header(data[:place] + bytes([12]) + data[place + 1 :])


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
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
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
