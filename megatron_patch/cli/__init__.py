"""`megatron-patch COMMAND ...`: what the scripts of toolkits and examples do, where the package alone is installed."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from megatron_patch.files.terminal import run
from megatron_patch.files.text import printable

COMMANDS = {
    "prepare": ("megatron_patch.prepare.commands", "LLaVA's json and images -> an energon dataset"),
    "convert": ("megatron_patch.conversion.commands", "Hugging Face <-> Megatron-Core, and to other parallel sizes"),
    "train": ("megatron_patch.cli.train", "pretrain on as many processes as are asked for"),
    "inspect": ("megatron_patch.conversion.inspect_checkpoint", "what a checkpoint is, without loading it"),
    "preview": ("megatron_patch.data.inspect_samples", "a page of samples as the model sees them"),
}
"""Name -> the module whose `main` it is, and what it does."""


def main() -> int:
    """Run the command that is named first. A mistake is one line on stderr and exit code 2."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        is_asked = len(sys.argv) > 1
        rows = (f"  {command:10} {what}" for command, (_, what) in COMMANDS.items())
        print("usage: megatron-patch COMMAND [--help]", *rows, sep="\n", file=sys.stdout if is_asked else sys.stderr)
        return 0 if is_asked else 2
    if name not in COMMANDS:
        print(f"error: {printable(name)}: no such command; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # As each reads them: its own name, and what follows.
    sys.argv[:2] = [f"{Path(sys.argv[0]).name} {name}"]
    return import_module(COMMANDS[name][0]).main()


def console() -> None:
    """The entry point of the installed command."""
    run(main)
