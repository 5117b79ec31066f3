"""The command that prints what a checkpoint is, without loading it.

Hugging Face (safetensors or .bin), Megatron-Core shards (mp_rank), and torch_dist.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_patch.files.terminal import loading


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per fact. Returns the exit code; a mistake is one line on stderr."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    usage = f"usage: {Path(sys.argv[0]).name} FOLDER"
    if arguments in (["-h"], ["--help"]):
        print(usage)
        return 0
    if len(arguments) != 1:
        print(usage, file=sys.stderr)
        return 2
    with loading():
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
