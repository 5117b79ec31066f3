"""Pictures as transformers' CLIPImageProcessor (PIL) gives them, bit for bit, cut in two.

The data side resizes and crops to uint8, a quarter of the bytes; the device normalises.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 89_478_485
"""Pixels that a picture may have, as it is or resized (what PIL calls a decompression bomb beyond)."""

# What CLIP's transform does. A preprocessor_config.json that asks for anything else is refused.
SUPPORTED = {
    "do_resize": (True,),
    "do_center_crop": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True, None),
    "do_pad": (False, None),
    "resample": (Image.Resampling.BICUBIC.value,),
    "rescale_factor": (1 / 255,),
}


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """CLIP's transform: shortest edge to `size`, cut `crop_size` (height, width) from the middle, normalise."""

    size: int
    crop_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_image_settings(folder: Path) -> ImageSettings:
    """The transform that `folder`/preprocessor_config.json describes.

    Raises FileNotFoundError when it is missing, ValueError when it asks for more than CLIP's transform.
    """
    path = Path(folder) / "preprocessor_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected the vision tower's, as CLIP's checkpoint has it")
    try:
        return _settings(json.loads(path.read_text()))
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def load_pixels(data: bytes, settings: ImageSettings) -> Tensor:
    """Decode, convert to RGB, resize and crop an encoded picture -> uint8 [3, h, w].

    Raises ValueError for what is no picture, is cut off, or has more than `MAX_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            # The header tells the size: refused before anything is decoded.
            _check_pixels("picture", *picture.size)
            rgb = _to_rgb(picture)
    except Exception as error:
        # Pillow raises OSError, SyntaxError, struct.error and others of its own for broken files.
        raise ValueError(f"picture cannot be read: {error}") from error
    width, height = rgb.size
    shortest, longest = min(width, height), max(width, height)
    # transformers' rounding: down.
    longest = int(settings.size * longest / shortest)
    size = (settings.size, longest) if width <= height else (longest, settings.size)
    _check_pixels(f"picture of {width} x {height} resized to shortest edge {settings.size}", *size)
    array = np.asarray(rgb.resize(size, Image.Resampling.BICUBIC))  # [h, w, 3]
    array = _center_crop(array, *settings.crop_size).transpose(2, 0, 1)  # [3, h, w]
    return torch.from_numpy(array.copy())


def normalize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """uint8 [n, 3, h, w] -> the tower's input of the same shape, computed in fp32 where the pixels lie, then cast."""
    options = {"dtype": torch.float32, "device": pixels.device}
    mean_, std_ = (torch.tensor(values, **options).view(1, 3, 1, 1) for values in (mean, std))
    # transformers multiplies by 1/255 in fp64 and rounds to fp32: for each of the 256 values that is value / 255.
    return ((pixels.float() / 255 - mean_) / std_).to(dtype)


def _settings(config: dict[str, Any]) -> ImageSettings:
    for name, allowed in SUPPORTED.items():
        given = config.get(name, allowed[0])
        if given not in allowed:
            raise ValueError(f"{name} is {given!r}, only {allowed[0]!r} is supported (CLIP's transform)")
    size, crop = config["size"], config["crop_size"]
    if isinstance(size, dict):
        if set(size) != {"shortest_edge"}:
            raise ValueError(f"size is {size!r}, only a shortest_edge is supported (CLIP's transform)")
        size = size["shortest_edge"]
    crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"image_mean {mean} and image_std {std}: expected three numbers each")
    return ImageSettings(size=size, crop_size=crop, mean=mean, std=std)


def _check_pixels(what: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{what}: {width} x {height} pixels, more than {MAX_PIXELS} are refused")


def _to_rgb(picture: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as in transformers 5."""
    if "A" not in picture.getbands() and picture.info.get("transparency") is None:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def _center_crop(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of [h, w, 3]. Where the picture is smaller, black around it, the odd line above and on the left."""
    pads = [max(0, wanted - given) for wanted, given in zip((height, width), array.shape, strict=False)]
    if any(pads):
        array = np.pad(array, [*((math.ceil(pad / 2), pad // 2) for pad in pads), (0, 0)])
    top, left = ((given - wanted) // 2 for wanted, given in zip((height, width), array.shape, strict=False))
    return array[top : top + height, left : left + width]
