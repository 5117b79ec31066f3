"""Pixels are CLIPImageProcessor's or LlavaImageProcessor's, bit for bit: transformers is the judge."""

import io
import json
import shutil
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from megatron_patch.data.images import _window, load_pixels, normalize
from megatron_patch.data.preprocessor import preprocessor_of, read_image_settings, read_preprocessor
from megatron_patch.data.processor import write_processor
from tests.unit.data.samples import CLIP, PHOTO_SIZES, describe, jpeg, photo, settings


def write_settings(folder, **changed):
    (folder / "preprocessor_config.json").write_text(json.dumps({**CLIP, **changed}))
    return read_image_settings(folder)


def processor_of(folder):
    """The PIL one that the folder names, under its name in transformers 5 and 4."""
    name = json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"]
    return getattr(transformers, f"{name}Pil", getattr(transformers, name, None)).from_pretrained(folder)


def write_transform(folder, transform, size=28):
    """CLIP's file, rewritten for another transform as training rewrites it."""
    write_settings(folder, size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    settings = read_image_settings(folder, transform)
    changed = preprocessor_of(settings, read_preprocessor(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps(changed))
    # What was written says the same without being told.
    assert read_image_settings(folder) == settings
    return settings


def encoded(mode, size, file_format, **options):
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    if mode == "P":
        picture = Image.fromarray(noise[..., 0]).convert("P")
    else:
        picture = Image.fromarray(noise.squeeze(-1) if bands == 1 else noise, mode)
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def assert_equal_to_transformers(data, folder, settings):
    expected = processor_of(folder)(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"]
    pixels = load_pixels(data, settings)[None]
    assert pixels.dtype == torch.uint8
    assert torch.equal(normalize(pixels, settings.mean, settings.std, torch.float32), expected)


TRANSFORMS = ["clip", "pad", "square"]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "picture",
    [
        ("RGB", (61, 47), "JPEG", {}),
        ("L", (61, 47), "JPEG", {}),
        ("CMYK", (61, 47), "JPEG", {}),
        pytest.param(("RGBA", (33, 50), "PNG", {}), marks=pytest.mark.transformers_5),
        pytest.param(("LA", (33, 50), "PNG", {}), marks=pytest.mark.transformers_5),
        pytest.param(("P", (33, 50), "PNG", {"transparency": 3}), marks=pytest.mark.transformers_5),
        ("P", (33, 50), "GIF", {"save_all": True, "append_images": [Image.new("L", (33, 50), 9)]}),
        ("RGB", (61, 47), "WEBP", {}),
        pytest.param(("RGB", (1, 1), "PNG", {}), marks=pytest.mark.transformers_5),
        ("RGB", (3, 200), "PNG", {}),
        ("RGB", (28, 28), "PNG", {}),
    ],
    ids=lambda picture: f"{picture[0]} {picture[1][0]}x{picture[1][1]}",
)
def test_every_kind_of_picture_is_bit_equal(picture, transform, tmp_path):
    settings = write_transform(tmp_path, transform)
    mode, size, file_format, options = picture
    assert_equal_to_transformers(encoded(mode, size, file_format, **options), tmp_path, settings)


def test_what_the_crop_leaves_out_changes_no_pixel(tmp_path):
    """Wide and high, smaller than the crop, and on both sides of 1:2, from where on Pillow 13 takes another order."""
    settings = write_transform(tmp_path, "clip", size=56)
    for short, long in (
        (75, 100),
        (66, 100),
        (67, 100),
        (40, 81),
        (80, 159),
        (80, 160),
        (80, 163),
        (80, 190),
        (9, 300),
    ):
        for size in ((short, long), (long, short)):
            assert_equal_to_transformers(encoded("RGB", size, "PNG"), tmp_path, settings)


def test_a_window_ends_where_pillow_can_begin():
    """Pillow takes places as float32. Where none is exact the window is everything."""
    assert _window(500, 448, 336) == range(56, 392)
    assert _window(32769, 4096, 334) == range(4096)
    for given in range(300, 700):
        window = _window(given, given * 3 // 4, 200)
        first = (given * 3 // 4 - 200) // 2
        assert window.start <= first <= window.stop - 200
        for place in (window.start, window.stop):
            assert float(np.float32(place * given / (given * 3 // 4))) == Fraction(place * given, given * 3 // 4)


def test_crop_larger_than_the_picture_pads_as_transformers_does(tmp_path):
    settings = write_settings(tmp_path, size={"shortest_edge": 21}, crop_size={"height": 28, "width": 30})
    for size in ((20, 40), (41, 20), (23, 24)):
        assert_equal_to_transformers(encoded("RGB", size, "PNG"), tmp_path, settings)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_photographs_are_bit_equal(transform, tmp_path):
    """Of each size, and CMYK made of the first. (Real ones: benchmarks/pixels.py.)"""
    settings = write_transform(tmp_path, transform, 336)
    photos = [photo(index) for index in range(len(PHOTO_SIZES))]
    file = io.BytesIO()
    Image.open(io.BytesIO(photos[0])).convert("CMYK").save(file, "JPEG")
    for picture in [*photos, file.getvalue()]:
        assert_equal_to_transformers(picture, tmp_path, settings)


def test_a_run_writes_its_transform_beside_the_weights(tmp_path):
    llava = describe(tmp_path / "model")
    for name in ("auto", "pad", "square"):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "model", folder)
        config = settings(tmp_path / "model", image_transform=name)
        write_processor(config, llava.language.family.name, folder)
        assert json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"] == (
            "LlavaImageProcessor" if name == "pad" else "CLIPImageProcessor"
        )
        assert read_image_settings(folder).transform == {"auto": "clip"}.get(name, name)


def test_normalize_casts_after_computing_in_fp32(tmp_path):
    settings = write_settings(tmp_path)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    exact = normalize(pixels, settings.mean, settings.std, torch.float32)
    assert torch.equal(normalize(pixels, settings.mean, settings.std, torch.bfloat16), exact.bfloat16())
    assert normalize(pixels[:0], settings.mean, settings.std, torch.float32).shape == (0, 3, 16, 16)


def png_header(width, height):
    """A PNG whose header announces a size; nothing of it is there."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (png_header(10_000, 9_500), "pixels"),
        (png_header(20_000, 20_000), "pixels"),
        (encoded("RGB", (2, 60_000), "PNG"), "resized"),
        (jpeg((1, 2, 3), (200, 200))[:-400], "truncated"),
        (b"", "cannot"),
        (b"GIF89a, not really", "cannot"),
        (png_header(10, 10), "cannot"),
    ],
    ids=["bomb", "larger bomb", "bomb when resized", "truncated", "empty", "text", "no pixels"],
)
def test_bombs_and_broken_files_are_refused_in_one_line(data, why, tmp_path):
    settings = write_settings(tmp_path, size={"shortest_edge": 336})
    with pytest.raises(ValueError, match=why) as caught:
        load_pixels(data, settings)
    assert "\n" not in str(caught.value)
