"""Images as transformers' CLIPImageProcessor or LlavaImageProcessor (PIL) gives them, bit for bit, in two steps.

The data side resizes and crops to uint8, a quarter of the bytes; the device normalises.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_patch.data.decode import check_pixels, decode
from megatron_patch.data.preprocessor import ImageSettings


def load_pixels(data: bytes, settings: ImageSettings) -> Tensor:
    """Decode, turn upright, convert to RGB, resize and crop an encoded image -> uint8 [3, h, w].

    Raises ValueError for what `decode` refuses, and for what is too large when it is resized.
    """
    try:
        rgb = decode(data)
    except ValueError as error:
        raise ValueError(f"image cannot be read: {error}") from error
    rgb = transform(rgb, settings)
    planes = bytearray().join(rgb.tobytes("raw", band) for band in "RGB")
    return torch.frombuffer(planes, dtype=torch.uint8).view(3, rgb.height, rgb.width)  # [3, h, w]


def transform(rgb: Image.Image, settings: ImageSettings) -> Image.Image:
    """The tower's part of an RGB image. Raises ValueError when it would have more than `MAX_PIXELS` on the way."""
    height, width = settings.crop_size
    if settings.transform == "square":
        return rgb.resize((width, height), Image.Resampling.BICUBIC)
    if settings.transform == "pad":
        rgb = _expand_to_square(rgb, settings.mean)
    shortest, longest = min(rgb.size), max(rgb.size)
    # transformers' rounding: down.
    longest = int(settings.size * longest / shortest)
    size = (settings.size, longest) if rgb.width <= rgb.height else (longest, settings.size)
    check_pixels(f"image of {rgb.width} x {rgb.height} resized to shortest edge {settings.size}", *size)
    return _resize_and_crop(rgb, size, (width, height))


def normalize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """uint8 [n, 3, h, w] -> the tower's input of the same shape, computed in fp32 where the pixels lie, then cast."""
    mean_, std_ = _per_channel(mean, pixels.device), _per_channel(std, pixels.device)
    # transformers multiplies by 1/255 in fp64 and rounds to fp32: for each of the 256 values that is value / 255.
    return ((pixels.float() / 255 - mean_) / std_).to(dtype)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """fp32 [1, 3, 1, 1], made once: the host would wait for a GPU each time."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)


def _expand_to_square(rgb: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """The image in the middle of a square of the mean colour: LLaVA's expand2square."""
    side = max(rgb.size)
    check_pixels(f"image of {rgb.width} x {rgb.height} made square", side, side)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
    return square


def _resize_and_crop(rgb: Image.Image, size: tuple[int, int], crop: tuple[int, int]) -> Image.Image:
    """Resize to `size`, which keeps the aspect, and cut the middle `crop` out, both (width, height).

    Where the image is smaller than the crop, black around it, the odd line above and on the left.
    """
    (width, height), bicubic = size, Image.Resampling.BICUBIC
    left, top = (width - crop[0]) // 2, (height - crop[1]) // 2
    if rgb.height > 2 * rgb.width:
        # Of what is as high as this, Pillow 13 resizes the rows first.
        return rgb.resize(size, bicubic).crop((left, top, left + crop[0], top + crop[1]))
    # Pillow's own two steps, so that no pixel changes, without most of what is cut off. Columns:
    columns, rows = _window(rgb.width, width, crop[0]), _window(rgb.height, height, crop[1])
    first, last = (place * rgb.width / width for place in (columns.start, columns.stop))
    upper, lower = (place * rgb.height / height for place in (rows.start, rows.stop))
    reach = math.ceil(2 * max(1, rgb.height / height))  # of a bicubic row's weights
    above, below = max(0, math.floor(upper) - reach), min(rgb.height, math.ceil(lower) + reach)
    rgb = rgb.resize((len(columns), below - above), bicubic, box=(first, above, last, below))
    # Rows, of the wanted columns only:
    left -= columns.start
    rgb = rgb.crop((left, 0, left + crop[0], rgb.height))
    rgb = rgb.resize((crop[0], len(rows)), bicubic, box=(0, upper - above, crop[0], lower - above))
    top -= rows.start
    return rgb.crop((0, top, crop[0], top + crop[1]))


def _window(given: int, resized: int, wanted: int) -> range:
    """The middle `wanted` of the positions that `given` pixels are resized to, and as few more as have exact ends.

    Pillow takes the ends, in pixels of the source, as float32: rounded ones would shift what each pixel is made of.
    """
    first = max(0, (resized - wanted) // 2)
    step = resized // math.gcd(given, resized)
    step //= step & -step  # halves are exact
    start, stop = first // step * step, min(resized, math.ceil((first + wanted) / step) * step)
    ends = (start * given / resized, stop * given / resized)
    return range(start, stop) if all(float(np.float32(end)) == end for end in ends) else range(resized)
