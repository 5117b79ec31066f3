"""Encoded images as Pillow reads them: by a list of formats, turned as their EXIF mark says, in RGB.

The data converter and training ask the same functions, so that what the one takes the other can use.
"""

from __future__ import annotations

import functools
import importlib
import io

import PIL
from PIL import ExifTags, Image, UnidentifiedImageError

from megatron_patch.data.image_headers import DEEP, MAX_PIXELS, Rejected, check_scans, kind_of

# Pillow's other formats are of no use here, and for some of them (EPS) it starts a program.
FORMATS = {
    "JPEG": "Jpeg",
    "PNG": "Png",
    "GIF": "Gif",
    "WEBP": "WebP",
    "BMP": "Bmp",
    "TIFF": "Tiff",
    "AVIF": "Avif",
    "JPEG2000": "Jpeg2K",
    "PPM": "Ppm",
}
"""Pillow's name of a format -> of the module that reads it."""
BAND_PIXELS = 4_000_000
"""As many are composited at once: several copies of a large image would not fit in a reader's memory."""
DEEP_MODES = {"I": "16 or 32", "F": "32", "I;16": "16", "I;16L": "16", "I;16B": "16", "I;16N": "16"}
"""Pillow's modes that it clips to 0 to 255 where it makes RGB of them -> bits."""
# EXIF 2.32, tag 274: where row 0 and column 0 are.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes) -> Image.Image:
    """Decode an image and turn it upright, as transformers' load_image does -> RGB; what is transparent becomes white.

    Raises ValueError, in a line, for what cannot be read, has more than `MAX_PIXELS`, or is gray of 16 bits or more.
    """
    try:
        # The header tells size and mode: refused before anything is decoded.
        check_scans(data)
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            check_pixels("image", *image.size)
            if image.mode in DEEP_MODES:
                raise ValueError(f"gray of {DEEP_MODES[image.mode]} bits{DEEP}")
            image.load()
            return _to_rgb(_upright(image))
    except UnidentifiedImageError:
        raise Rejected(_unidentified(data)) from None
    except Exception as error:
        # Pillow raises OSError, SyntaxError, struct.error and others of its own for broken files.
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def check_pixels(what: str, width: int, height: int) -> None:
    """Raises ValueError for more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{what}: {width} x {height} pixels, more than {MAX_PIXELS} are refused")


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    for module in FORMATS.values():
        try:
            importlib.import_module(f"PIL.{module}ImagePlugin")
        except ImportError:  # AVIF came with Pillow 11.3
            continue
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _unidentified(data: bytes) -> str:
    kind = kind_of(data)
    if kind is None:
        return "neither JPEG nor PNG, GIF, WebP, BMP, TIFF, AVIF, JPEG 2000"
    return f"{kind}, which Pillow {PIL.__version__} cannot read; make it one of {', '.join(_formats())}"


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return image  # damaged EXIF, for which Pillow raises what it likes: the image itself is whole
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as in transformers 5's convert_to_rgb."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return rgb
