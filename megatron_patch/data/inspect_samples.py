"""The command that writes a page of samples as the model sees them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from megatron_patch.config.flags import parse
from megatron_patch.config.train import Config
from megatron_patch.families.llava import read_config
from megatron_patch.files.marks import check_page
from megatron_patch.files.terminal import loading
from megatron_patch.files.text import printable
from megatron_patch.files.whole import write_whole

USAGE = """\
Write one HTML page of samples as the model sees them: the image after its transform, each token with its label.

    {name} CHECKPOINT DATASET PAGE.html [--num-batches 20] [flags of training]

CHECKPOINT is a folder with config.json, tokenizer and processor, such as the converter writes; DATASET is what
DATASET_PATH is. The flags are training's: --decoder-seq-length, --prompt-format, --packing-buffer-size and others."""
NUM_BATCHES = "--num-batches"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 or 2 with one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    usage = USAGE.format(name=Path(sys.argv[0]).name)
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if len(argv) < 3 or argv[0].startswith("-"):
        print(usage, file=sys.stderr)
        return 2
    checkpoint, dataset, page, *flags = argv
    count = "20"
    if NUM_BATCHES in flags:
        place = flags.index(NUM_BATCHES)
        count = next(iter(flags[place + 1 :]), "without a number")
        flags[place : place + 2] = []
    if not count.isdecimal() or not int(count):
        print(f"error: {NUM_BATCHES} {count}: expected 1 or more", file=sys.stderr)
        return 2
    # Training's own settings, of which only the data's are used.
    needed = {"--model-config": checkpoint, "--pretrained-checkpoint": checkpoint, "--data-path": dataset}
    needed |= {"--lr": "1", "--train-iters": "1", "--output": page, "--num-workers": "0"}
    config = parse(Config, [*(word for pair in needed.items() for word in pair), *flags])
    try:
        _write(config, Path(page), int(count))
    except (ValueError, OSError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 1
    return 0


def _write(config: Config, page: Path, count: int) -> None:
    with loading():
        from megatron_patch.data.loader import train_loader
        from megatron_patch.data.preview import HEAD, write_page
        from megatron_patch.data.tokenize import load_tokenizer

    check_page(page, HEAD[:100])
    llava = read_config(config.model.description)
    config.check(llava)
    loader = train_loader(config, llava, rank=0, world_size=1)
    tokenizer = load_tokenizer(config.model.description)
    write_whole(page, write_page(islice(loader, count), tokenizer, llava.image_token_id))
    print(f"wrote {page}: {count} batches of {config.data.data_path}")
