"""Seconds per picture from JPEG bytes to the tower's input, ours against transformers' image processor (PIL), in turn.

python benchmarks/pixels.py FOLDER: a folder of LLaVA-Pretrain's layout. Each transform's pixels are compared, too.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from PIL import Image

from megatron_patch.conversion.companions import preprocessor_config
from megatron_patch.data.images import load_pixels, normalize
from megatron_patch.data.preprocessor import preprocessor_of, read_image_settings
from megatron_patch.families.clip import CLIP
from megatron_patch.families.sizes import VisionModel

CLIP_L_336 = VisionModel(
    family=CLIP,
    num_layers=23,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    layernorm_epsilon=1e-5,
    patch_dim=14,
    img_size=336,
)
ROUNDS = 3


def main() -> int:
    """Print a line per transform; exit code 1 when a picture's pixels differ."""
    torch.set_num_threads(1)
    pictures = [path.read_bytes() for path in sorted(Path(sys.argv[1]).glob("*/*.jpg"))]
    differing = 0
    print("| transform | pictures | differing | decode ms | ours ms | transformers ms | ratio, decoding left out |")
    print("|---|---|---|---|---|---|---|")
    for transform in ("clip", "pad", "square"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "preprocessor_config.json"
            path.write_text(json.dumps(preprocessor_config(CLIP_L_336)))
            settings = read_image_settings(Path(folder), transform)
            path.write_text(json.dumps(preprocessor_of(settings, preprocessor_config(CLIP_L_336))))
            name = json.loads(path.read_text())["image_processor_type"]
            processor = getattr(transformers, f"{name}Pil", getattr(transformers, name, None)).from_pretrained(folder)

        def theirs(data: bytes, processor: Callable = processor) -> torch.Tensor:
            return processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"]

        def ours(data: bytes, settings=settings) -> torch.Tensor:
            return load_pixels(data, settings)

        for data in pictures:
            pixels = normalize(ours(data)[None], settings.mean, settings.std, torch.float32)
            differing += not torch.equal(pixels, theirs(data))
        rounds = [[_milliseconds(function, pictures) for function in (_decode, ours, theirs)] for _ in range(ROUNDS)]
        decode, our, their = map(statistics.median, zip(*rounds, strict=True))
        print(
            f"| {transform} | {len(pictures)} | {differing} | {decode:.2f} | {our:.2f} | {their:.2f} | "
            f"{(our - decode) / (their - decode):.2f} |"
        )
    return 1 if differing else 0


def _decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _milliseconds(function: Callable[[bytes], object], pictures: list[bytes]) -> float:
    start = time.process_time()
    for data in pictures:
        function(data)
    return 1000 * (time.process_time() - start) / len(pictures)


if __name__ == "__main__":
    sys.exit(main())
