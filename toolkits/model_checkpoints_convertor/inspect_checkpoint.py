"""Print what a checkpoint is, without loading it: `python inspect_checkpoint.py FOLDER`.

Hugging Face (safetensors or .bin), Megatron-Core shards (mp_rank), and torch_dist. (Not called inspect.py: that would
hide Python's own module from the programs beside it.)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per fact. Returns the exit code; a mistake is one line on stderr."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: python inspect_checkpoint.py FOLDER", file=sys.stderr)
        return 2
    from megatron_patch.conversion.summary import summarize

    try:
        facts = summarize(Path(arguments[0]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    width = max(map(len, facts))
    for title, text in facts.items():
        print(f"{title:{width}}  {text}")
    return 0


if __name__ == "__main__":
    from megatron_patch.files.terminal import outlive_readers

    outlive_readers()
    sys.exit(main())
