"""How a source's image processor transforms an image: its settings, wherever transformers keeps them. No torch.

transformers 4 reads preprocessor_config.json; 5 writes `image_processor` into processor_config.json and prefers that.
The class decides what a setting means, so one that is not known here is refused by its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_patch.families.registry import VISION_FAMILIES
from megatron_patch.files.json_object import read_json
from megatron_patch.files.names import CONFIG, PREPROCESSOR, PROCESSOR

Transform = Literal["clip", "pad", "square"]
"""clip: shortest edge to `size`, then the middle. pad: before that, the mean colour around it to make it square, as in
LLaVA-1.5's second stage. square: to `crop_size` whatever its shape."""

NESTED = "image_processor"
TYPE = "image_processor_type"
CLIP, LLAVA = "CLIPImageProcessor", "LlavaImageProcessor"
TOWERS = VISION_FAMILIES.values()
# What each class means by leaving a setting out. LLaVA's is CLIP's, with padding.
DEFAULTS = {tower.image_processor: tower.image_settings for tower in TOWERS}
DEFAULTS[LLAVA] = DEFAULTS[CLIP]
# What transformers takes for a config.json's model_type where no file names a class.
OF_MODELS = {tower.name: tower.image_processor for tower in TOWERS}
OF_MODELS |= {tower.whole_model: tower.image_processor for tower in TOWERS} | {"llava": LLAVA}
# What all transforms do. Settings that ask for anything else are refused.
SUPPORTED = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True, None),
    "do_pad": (False, True, None),
    "resample": (3,),  # PIL's bicubic
    "rescale_factor": (1 / 255,),
    "pad_size": (None,),
    "use_square_size": (None, False),
}


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How an image becomes the tower's input: a transform to `crop_size` (height, width), then normalisation."""

    transform: Transform
    size: int
    """Shortest edge before the middle is cut out; square makes no use of it."""
    crop_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def has_preprocessor(folder: Path) -> bool:
    """Whether `folder` says how an image is transformed. Raises as `read_preprocessor` does."""
    return bool(_found(Path(folder)))


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """An image processor's settings as they stand in their file, the class by the name that every version knows.

    Raises FileNotFoundError where there are none, and ValueError that names the file for those of another class, for
    what no transform here does, and where two files give transformers 4 and 5 different ones.
    """
    folder = Path(folder)
    found = _found(folder)
    if not found:
        raise FileNotFoundError(
            f"{folder / PREPROCESSOR}: missing; expected the vision tower's, as CLIP's checkpoint has it"
        )
    said = {path: _checked(path, config, folder) for path, config in found.items()}
    (first, (kind, settings)), *others = said.items()
    for other, (_, differing) in others:
        if differing != settings:
            raise ValueError(
                f"{first}: its {NESTED} is not what {other} says, and transformers 4 and 5 would differ; remove the "
                "one that does not hold"
            )
    return {**found[first], TYPE: kind}


def read_image_settings(folder: Path, transform: Transform | Literal["auto"] = "auto") -> ImageSettings:
    """What `folder`'s image processor does, with `transform` in place of its own unless that is auto.

    Raises as `read_preprocessor` does.
    """
    folder = Path(folder)
    config = read_preprocessor(folder)
    settings = _settings(config[TYPE], config)
    return settings if transform == "auto" else replace(settings, transform=transform)


def check_crop(folder: Path, settings: ImageSettings, img_size: int) -> None:
    """Raise ValueError where the settings that `folder` has give images of another size than the tower takes."""
    if settings.crop_size != (img_size, img_size):
        raise ValueError(
            f"{folder}/{PREPROCESSOR}: crop_size is {settings.crop_size}, but the vision tower takes {img_size} x "
            f"{img_size} pixels; use the tower's own {PREPROCESSOR}"
        )


def preprocessor_of(settings: ImageSettings, config: dict[str, Any]) -> dict[str, Any]:
    """A preprocessor_config.json by which every transformers does what `settings` say; the rest is as in `config`."""
    height, width = settings.crop_size
    square = settings.transform == "square"
    kept = {name: value for name, value in config.items() if name not in ("auto_map", "feature_extractor_type")}
    return {
        **kept,
        TYPE: _class_of(settings, str(config.get(TYPE))),
        "size": {"height": height, "width": width} if square else {"shortest_edge": settings.size},
        "do_center_crop": not square,
        "crop_size": {"height": height, "width": width},
        "do_pad": settings.transform == "pad",
        # Which not every version means by leaving them out.
        "do_convert_rgb": True,
        "resample": 3,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }


def _class_of(settings: ImageSettings, kind: str) -> str:
    """The class that transforms so: where `kind` only ever makes a square, or does not pad, another."""
    if settings.transform == "pad":
        return LLAVA
    if settings.transform == "square" and kind in DEFAULTS and kind != LLAVA:
        return kind
    return CLIP


def _found(folder: Path) -> dict[Path, dict[str, Any]]:
    """The settings that there are, by their file, transformers 5's first."""
    found = {}
    for path in (folder / PROCESSOR, folder / PREPROCESSOR):
        if path.is_file():
            config = read_json(path)
            nested = config.get(NESTED)
            if nested is not None and not isinstance(nested, dict):
                raise ValueError(f"{path}: {NESTED} is {_short(nested)}; expected an object")
            if nested is not None or path.name == PREPROCESSOR:
                found[path] = config if nested is None else nested
    return found


def _checked(path: Path, config: dict[str, Any], folder: Path) -> tuple[str, ImageSettings]:
    """The class and what it does, with the file in the message of an error."""
    try:
        kind = _kind(config, folder)
        return kind, _settings(kind, config)
    except (ValueError, TypeError) as error:
        raise ValueError(error if str(folder) in str(error) else f"{path}: {error}") from None


def _kind(config: dict[str, Any], folder: Path) -> str:
    """The class, in the order in which transformers looks for its name."""
    name = config.get(TYPE)
    if name is None and config.get("auto_map"):
        raise ValueError(f"auto_map names an image processor of its own code; only {_listed()} are supported")
    if name is None and config.get("feature_extractor_type") is not None:
        name = str(config["feature_extractor_type"]).replace("FeatureExtractor", "ImageProcessor")
    if name is None and (folder / CONFIG).is_file():
        model = read_json(folder / CONFIG)
        name = model.get(TYPE) or OF_MODELS.get(str(model.get("model_type")))
    if name is None:
        raise ValueError(f"has no {TYPE}; expected {' or '.join(DEFAULTS)}")
    base = str(name).removesuffix("Fast").removesuffix("Pil")
    if base not in DEFAULTS:
        raise ValueError(f"{TYPE} is {_short(name)}; only {_listed()} are supported, use a tower with its own")
    return base


def _listed() -> str:
    *names, last = DEFAULTS
    return f"{', '.join(names)} and {last}"


def _settings(kind: str, config: dict[str, Any]) -> ImageSettings:
    for name, allowed in SUPPORTED.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} is {_short(config[name])}, only {allowed[0]!r} is supported")
    values = {name: config.get(name, default) for name, default in DEFAULTS[kind].items()}
    crops = values["do_center_crop"]
    if not isinstance(crops, bool):
        raise ValueError(f"do_center_crop is {_short(crops)}; expected true or false")
    size = _lengths("size", values["size"], square=False)
    if "height" in DEFAULTS[kind]["size"] and set(size) != {"height", "width"}:
        raise ValueError(f"size is {_short(values['size'])}; {kind} takes height and width")
    given = config.get("crop_size", DEFAULTS[kind].get("crop_size"))
    crop = _lengths("crop_size", given, square=True) if crops or given is not None else {}
    pads = kind == LLAVA and bool(config.get("do_pad"))  # CLIP's class makes nothing of it
    height, width = crop.get("height"), crop.get("width")
    if set(size) == {"shortest_edge"} and crops:
        transform, edge = "pad" if pads else "clip", size["shortest_edge"]
    elif set(size) == {"height", "width"} and not pads:
        # Cutting the middle out of what has this size already changes nothing.
        if crops and (height, width) != (size["height"], size["width"]):
            raise ValueError(f"size is {size!r} and crop_size another; only a shortest_edge can be cropped")
        height, width = size["height"], size["width"]
        transform, edge = "square", min(height, width)
    else:
        raise ValueError(
            f"size is {_short(size)} with do_center_crop {crops}; only a shortest_edge with it, and height and width "
            f"without it, are supported"
        )
    if height is None or width is None:
        raise ValueError(f"crop_size is {_short(given)}; expected height and width")
    mean, std = (_per_channel(name, values[name]) for name in ("image_mean", "image_std"))
    if 0 in std:
        raise ValueError(f"image_std is {_short(values['image_std'])}; expected no 0")
    return ImageSettings(transform=transform, size=edge, crop_size=(height, width), mean=mean, std=std)


def _lengths(name: str, value: object, square: bool) -> dict[str, int]:
    """A size's lengths by their names. A number, as old files have it, is a `square`'s side or the shortest edge."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, list) and len(value) == 2:
        value = dict(zip(("height", "width"), value, strict=True))
    if isinstance(value, dict):
        value = {key: length for key, length in value.items() if length is not None}
        if all(type(length) is int and 0 < length < 2**31 for length in value.values()):
            return value
    raise ValueError(f"{name} is {_short(value)}; expected numbers of pixels")


def _per_channel(name: str, value: object) -> tuple[float, float, float]:
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3 or not all(type(number) in (int, float) and math.isfinite(number) for number in values):
        raise ValueError(f"{name} is {_short(value)}; expected three numbers")
    red, green, blue = values
    return red, green, blue


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
