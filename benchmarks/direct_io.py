"""What O_DIRECT brings the converter: the same conversion past the page cache and through it, in turn.

    python benchmarks/direct_io.py [--size 7B] [--depth 32] [--repeat 3] [--folder DIR]

A synthetic Mistral and CLIP-L/14-336 to TP4, whole processes, sources cold. Needs twice the model's size on the disk.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from converter import CONVERT, SIZES, Run, flags, folder_size, load, make_models, run

CACHED = (
    "import sys; from megatron_patch.tensor_io import disk; disk.DIRECT = 0; "
    "from megatron_patch.conversion.commands import main; sys.exit(main())"
)


def main() -> int:
    """Print a line per way, and each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument("--depth", type=int, help="layers; default: the model's own")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options = parser.parse_args()
    ways: dict[str, list[object]] = {
        "past the page cache": [sys.executable, CONVERT],
        "through it": [sys.executable, "-c", CACHED],
    }
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as name:
        folder = Path(name)
        language, tower = make_models(folder, options.size, options.depth or SIZES[options.size][2])
        size, shards = folder_size(language) + folder_size(tower), folder / "shards"
        for number in range(options.repeat):
            for way in list(ways)[:: -1 if number % 2 else 1]:
                command = [*ways[way], *flags(language, tower, shards, "4", "1"), "--verify=false"]
                runs[way].append(run(command, language, tower))
                shutil.rmtree(shards)
                print(f"{way}: {runs[way][-1]}, {load()}", flush=True)
    print(f"| {size / 1e9:.2f} GB to TP4 | seconds (median) | peak MB | runs |")
    print("|---|---|---|---|")
    for way, mine in runs.items():
        seconds = sorted(one.seconds for one in mine)
        each = " ".join(f"{one.seconds:.1f}" for one in mine)
        print(f"| {way} | {seconds[len(seconds) // 2]:.1f} | {max(one.peak_mb for one in mine)} | {each} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
