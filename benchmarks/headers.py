"""Time per image of looking at its header, ours against Pillow's Image.open, in turn; and what each finds.

    python benchmarks/headers.py [FOLDER]

FOLDER: of LLaVA-Pretrain's layout; without one images are drawn. Every image is also cut in half, which a look at the
header should find: else training does.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from data import draw
from PIL import Image

from megatron_patch.data.decode import decode
from megatron_patch.data.image_headers import check_header

COUNT = 400
ROUNDS = 5


def main() -> int:
    """Print a line per way."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(name)
        if len(sys.argv) == 1:
            draw(folder, COUNT)
        images = [path.read_bytes() for path in sorted(folder.glob("*/*.jpg"))]
    ways = {"ours (check_header)": check_header, "Image.open, size alone": _open, "decoding": decode}
    rounds = [[_microseconds(look, images) for look in ways.values()] for _ in range(ROUNDS)]
    print(
        f"| {len(images)} JPEGs, {sum(map(len, images)) / len(images) / 1e3:.1f} kB each | µs an image | halves found |"
    )
    print("|---|---|---|")
    for (way, look), times in zip(ways.items(), zip(*rounds, strict=True), strict=True):
        found = sum(_is_refused(look, image[: len(image) // 2]) for image in images)
        print(f"| {way} | {statistics.median(times):.1f} | {found} of {len(images)} |")
    return 0


def _open(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def _is_refused(look: Callable[[bytes], object], data: bytes) -> bool:
    try:
        look(data)
    except (ValueError, OSError):
        return True
    return False


def _microseconds(look: Callable[[bytes], object], images: list[bytes]) -> float:
    start = time.process_time()
    for image in images:
        look(image)
    return 1e6 * (time.process_time() - start) / len(images)


if __name__ == "__main__":
    sys.exit(main())
