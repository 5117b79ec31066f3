"""An image processor's settings, wherever they lie and however they are spelled: transformers is the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from PIL import Image
from transformers import AutoImageProcessor

from megatron_patch.data.images import normalize, transform
from megatron_patch.data.preprocessor import has_preprocessor, preprocessor_of, read_image_settings, read_preprocessor
from tests.unit.data.samples import CLIP, but_in_transformers_4
from tests.unit.properties import changed, damaged, examples, one_line

PADS = {**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
OWN = "preprocessor_config.json"
NESTED = "processor_config.json"
WIDE = Image.effect_noise((61, 40), 90).convert("RGB")


def write(folder: Path, **files: dict) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def ours(folder: Path) -> torch.Tensor:
    settings = read_image_settings(folder)
    rgb = transform(WIDE, settings)
    pixels = torch.frombuffer(bytearray().join(rgb.tobytes("raw", band) for band in "RGB"), dtype=torch.uint8)
    return normalize(pixels.view(1, 3, rgb.height, rgb.width), settings.mean, settings.std, torch.float32)


def theirs(folder: Path) -> torch.Tensor:
    return AutoImageProcessor.from_pretrained(folder, backend="pil")(WIDE, return_tensors="pt")["pixel_values"]


def without(config: dict, *names: str, **changed: object) -> dict:
    return {**{name: value for name, value in config.items() if name not in names}, **changed}


KIND = "image_processor_type"
SPELLINGS = {
    "plain": {"preprocessor_config": CLIP},
    "old lengths": {"preprocessor_config": without(CLIP, size=28, crop_size=28)},
    "lengths in a list": {"preprocessor_config": without(CLIP, size=[28, 28], crop_size=[28, 28])},
    "fast": {"preprocessor_config": without(CLIP, image_processor_type="CLIPImageProcessorFast")},
    "pads": {"preprocessor_config": PADS},
    "saved by the PIL class": {"preprocessor_config": {**PADS, KIND: "LlavaImageProcessorPil"}},
    "CLIP's class does not pad": {"preprocessor_config": {**CLIP, "do_pad": True}},
    "feature extractor": {"preprocessor_config": without(CLIP, KIND, feature_extractor_type="CLIPFeatureExtractor")},
    "class by the model": {"preprocessor_config": without(PADS, KIND), "config": {"model_type": "llava"}},
    "class by a CLIP": {"preprocessor_config": without(CLIP, KIND), "config": {"model_type": "clip"}},
    "defaults": {"preprocessor_config": {KIND: "CLIPImageProcessor"}},
    "one mean": {"preprocessor_config": without(CLIP, image_mean=0.5, image_std=0.25)},
    "another tower's": {"preprocessor_config": {KIND: "SiglipImageProcessor", "size": {"height": 30, "width": 30}}},
    "another tower's defaults": {"config": {"model_type": "siglip"}, "preprocessor_config": {}},
    "another tower's fast": {"preprocessor_config": {KIND: "SiglipImageProcessorFast", "size": [30, 28]}},
    "nested": {"processor_config": {"image_processor": PADS, "processor_class": "LlavaProcessor"}},
    "nested and beside it": {"processor_config": {"image_processor": PADS}, "preprocessor_config": PADS},
    "not nested": {"processor_config": {"patch_size": 7}, "preprocessor_config": PADS},
}


@pytest.mark.parametrize("spelling", but_in_transformers_4(SPELLINGS, "saved by the PIL class"))
def test_pixels_are_those_of_transformers(spelling, tmp_path):
    write(tmp_path, **SPELLINGS[spelling])
    assert torch.equal(ours(tmp_path), theirs(tmp_path))
    # What is handed on says the same outright, in the one file that all versions read.
    (tmp_path / "handed on").mkdir()
    handed_on = preprocessor_of(read_image_settings(tmp_path), read_preprocessor(tmp_path))
    assert handed_on["do_convert_rgb"] is True  # transformers 4 takes other images otherwise, or none
    written = write(tmp_path / "handed on", preprocessor_config=handed_on)
    assert torch.equal(ours(written), theirs(tmp_path))
    assert torch.equal(theirs(written), theirs(tmp_path))


SQUARE = {KIND: "SiglipImageProcessor", "size": {"height": 30, "width": 30}}
REFUSED = {
    "a crop of no size": ({"preprocessor_config": {**SQUARE, "do_center_crop": True}}, "crop_size is None"),
    "a crop of a square": (
        {"preprocessor_config": {**SQUARE, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}}},
        "and crop_size another",
    ),
    "true for a size": ({"preprocessor_config": {**CLIP, "size": True}}, "size is True"),
    "no square in old lengths": ({"preprocessor_config": {KIND: "SiglipImageProcessor", "size": 28}}, "takes height"),
    "another class": ({"preprocessor_config": {**CLIP, KIND: "DPTImageProcessor"}}, "is 'DPTImageProcessor'"),
    "no square": (
        {"preprocessor_config": {KIND: "SiglipImageProcessor", "size": {"shortest_edge": 28}}},
        "takes height",
    ),
    "another class, nested": ({"processor_config": {"image_processor": {**CLIP, KIND: "ViTImageProcessor"}}}, "'ViT"),
    "a list of classes": ({"preprocessor_config": {**CLIP, KIND: ["CLIPImageProcessor"]}}, "image_processor_type is"),
    "code": ({"preprocessor_config": without(CLIP, KIND, auto_map={"AutoImageProcessor": "a.B"})}, "auto_map names"),
    "no class": ({"preprocessor_config": without(CLIP, KIND)}, "has no image_processor_type"),
    "versions differ": ({"processor_config": {"image_processor": PADS}, "preprocessor_config": CLIP}, "would differ"),
    "no mean": ({"preprocessor_config": {**CLIP, "image_mean": None}}, "image_mean is None"),
    "null": ({"preprocessor_config": {**CLIP, "do_center_crop": None}}, "do_center_crop is None"),
    "square edge": ({"preprocessor_config": {**CLIP, "use_square_size": True}}, "use_square_size is True"),
    "pads to a size": ({"preprocessor_config": {**CLIP, "do_pad": True, "pad_size": 9}}, "pad_size is 9"),
    "a square padded": ({"preprocessor_config": {**PADS, "size": {"height": 28, "width": 28}}}, "size is"),
    "not cropped": ({"preprocessor_config": {**CLIP, "do_center_crop": False}}, "do_center_crop False"),
    "another filter": ({"preprocessor_config": {**CLIP, "resample": 2}}, "resample is 2"),
    "not rescaled": ({"preprocessor_config": {**CLIP, "rescale_factor": 1.0}}, "rescale_factor is 1.0"),
    "another crop": ({"preprocessor_config": {**CLIP, "size": {"height": 28, "width": 30}}}, "size is"),
    "longest edge": ({"preprocessor_config": {**CLIP, "size": {"longest_edge": 28}}}, "size is"),
    "one of three means": ({"preprocessor_config": {**CLIP, "image_mean": [0.5]}}, "image_mean is"),
    "NaN": ({"preprocessor_config": {**CLIP, "image_std": [float("nan")] * 3}}, "image_std is"),
    "zero": ({"preprocessor_config": {**CLIP, "image_std": 0}}, "image_std is 0"),
    "text": ({"preprocessor_config": {**CLIP, "size": "28"}}, "size is '28'"),
    "a list": ({"preprocessor_config": []}, "holds a list; expected an object"),
    "nested list": ({"processor_config": {"image_processor": []}}, "expected an object"),
}


@pytest.mark.parametrize(("files", "message"), REFUSED.values(), ids=REFUSED)
def test_another_transform_is_refused(files, message, tmp_path):
    write(tmp_path, **files)
    with pytest.raises(ValueError, match=message) as caught:
        read_image_settings(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing(tmp_path):
    assert not has_preprocessor(tmp_path)
    write(tmp_path, processor_config={"patch_size": 14})
    assert not has_preprocessor(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json: missing"):
        read_image_settings(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tower")


@examples
@given(changed({"image_processor": PADS}), changed(PADS))
def test_whatever_the_files_say(folder, nested, own):
    write(folder, processor_config=nested, preprocessor_config=own)
    with one_line(folder):
        json.dumps(preprocessor_of(read_image_settings(folder), read_preprocessor(folder)))


@examples
@given(damaged(json.dumps(PADS).encode()))
def test_whatever_bytes_the_file_holds(folder, content):
    (folder / NESTED).unlink(missing_ok=True)
    (folder / OWN).write_bytes(content)
    with one_line(folder):
        read_image_settings(folder)
