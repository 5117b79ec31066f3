"""Which images are read, and how they are turned: transformers' load_image is the judge."""

import base64
import io
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, features
from transformers.image_utils import load_image

from megatron_patch.data import decode as module
from megatron_patch.data.decode import decode
from megatron_patch.data.image_headers import Rejected, check_decodes, check_header
from tests.unit.data.test_image_headers import with_scans
from tests.unit.properties import damaged, examples

# Pillow has AVIF since 11.3.
AVIF = ["AVIF"] if features.check("avif") else []
KINDS = ["JPEG", "PNG", "WEBP", "TIFF", *AVIF, "MPO", "JPEG2000"]


def encoded(file_format, mode="RGB", size=(45, 28), **options):
    noise = np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).convert(mode).save(file, file_format, **options)
    return file.getvalue()


def marked(orientation, file_format="JPEG", mode="RGB"):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(file_format, mode, exif=exif)


def with_xmp(orientation):
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    return encoded("JPEG", xmp=xmp.encode())


def as_transformers_opens(data):
    return load_image(base64.b64encode(data).decode())


@pytest.mark.parametrize(
    "data",
    [
        *(pytest.param(marked(mark), id=f"mark {mark}") for mark in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)),
        *(pytest.param(marked(6, kind), id=kind) for kind in KINDS),
        pytest.param(with_xmp(8), id="in XMP alone"),
        pytest.param(marked(6, "JPEG", "L"), id="gray"),
        pytest.param(marked(6, "PNG", "P"), id="palette"),
        pytest.param(marked(6, "TIFF", "CMYK"), id="CMYK"),
    ],
)
def test_images_are_turned_as_transformers_turns_them(data):
    expected = as_transformers_opens(data)
    found = decode(data)
    assert found.mode == "RGB"
    assert found.size == expected.size
    assert found.tobytes() == expected.tobytes()
    check_header(data)
    check_decodes(data)


def test_a_turned_image_with_transparency_is_white_there():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    Image.new("LA", (3, 2), (0, 0)).save(file, "PNG", exif=exif)
    found = decode(file.getvalue())
    assert found.size == (2, 3)
    assert found.getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_a_large_transparent_image_is_composited_in_bands(monkeypatch, mode):
    noise = np.random.default_rng(2).integers(0, 256, (50, 40, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode.replace("PA", "P"))
    options = {"transparency": 7} if mode == "PA" else {}
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    expected = decode(file.getvalue())
    composite, sizes = Image.alpha_composite, []
    monkeypatch.setattr(Image, "alpha_composite", lambda a, b: sizes.append(a.size) or composite(a, b))
    monkeypatch.setattr(module, "BAND_PIXELS", 40 * 12)
    assert decode(file.getvalue()).tobytes() == expected.tobytes()
    assert sizes == [*[(40, 12)] * 4, (40, 2)]


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0" + b"\xff" * 60,
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01",  # ends in the midst of its only entry
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01six\0",  # a text
    ],
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_image_as_it_is(file_format, exif):
    assert decode(encoded(file_format, exif=exif)).size == (45, 28)


def deep_pgm():
    return b"P5 2 2 65535\n" + bytes(8)


DEEP = {
    "PNG": lambda: encoded_gray("I;16", "PNG"),
    "big-endian TIFF": lambda: encoded_gray("I;16B", "TIFF"),
    "little-endian TIFF": lambda: encoded_gray("I;16", "TIFF"),
    "32 bits": lambda: encoded_gray("I", "TIFF"),
    "floats": lambda: encoded_gray("F", "TIFF"),
    "JPEG 2000": lambda: encoded_gray("I;16", "JPEG2000"),
    "PGM": deep_pgm,
}


def encoded_gray(mode, file_format):
    file = io.BytesIO()
    Image.new(mode, (6, 6), 700).save(file, file_format)
    return file.getvalue()


@pytest.mark.parametrize("kind", DEEP)
def test_gray_of_16_bits_and_more_is_refused(kind):
    data = DEEP[kind]()
    for read, error in ((decode, ValueError), (check_header, Rejected), (check_decodes, Rejected)):
        with pytest.raises(error, match=r"gray of .*(16|32) bits, which transformers would show the model white"):
            read(data)


@pytest.mark.parametrize("file_format", ["BMP", "TIFF", *AVIF, "JPEG2000", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_rarer_formats_are_read_and_checked(file_format, mode):
    data = encoded(file_format, mode)
    assert decode(data).tobytes() == as_transformers_opens(data).tobytes()
    for check in (check_header, check_decodes):
        check(data)
        for part in (10, len(data) // 2):
            with pytest.raises(Rejected):
                check(data[:part])


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (b'<?xml version="1.0"?>\n<svg width="1"/>', "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n", "EPS"),
        (b"%PDF-1.7", "PDF"),
        (b"8BPS" + bytes(40), "Photoshop's PSD"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"nothing", "neither JPEG nor PNG, GIF, WebP, BMP, TIFF, AVIF, JPEG 2000"),
    ],
)
def test_other_kinds_are_named_and_start_no_program(data, named, monkeypatch):
    # Pillow hands EPS to Ghostscript.
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    for read in (decode, check_header):
        with pytest.raises(ValueError, match=named):
            read(data)


def test_a_pillow_without_a_format_says_what_it_reads(monkeypatch):
    monkeypatch.setattr(module, "_formats", lambda: ("JPEG", "PNG"))
    with pytest.raises(ValueError, match=r"AVIF, which Pillow .* cannot read; make it one of JPEG, PNG"):
        decode(b"\0\0\0\x18ftypavif" + bytes(40))


@examples
@given(
    st.one_of(
        st.binary(max_size=64),
        *(damaged(encoded(kind, size=(9, 7))) for kind in (*KINDS, "GIF", "BMP", "PPM")),
        damaged(marked(6)),
        damaged(marked(6, "TIFF")),
    )
)
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_are_an_image_or_one_line(data):
    for read in (decode, check_header, check_decodes):
        said = "read"
        try:
            read(data)
        except ValueError as error:
            said = str(error)
        assert said.splitlines() == [said]


def test_hundreds_of_scans_are_refused_in_training_too():
    with pytest.raises(ValueError, match="scans of 9000000 pixels each, more than"):
        decode(with_scans(400, (3000, 3000)))
