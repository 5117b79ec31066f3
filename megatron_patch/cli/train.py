"""The training command: the launcher that a user starts, and each rank that it starts of the same script.

Python puts a script's folder first on its path, so that nothing else may lie in this one that hides a module.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from megatron_patch.config.flags import parse
from megatron_patch.config.train import Config
from megatron_patch.files.terminal import run
from megatron_patch.training.launch import is_worker, launch


def main(script: Path = Path(__file__)) -> int:
    """Train, on the processes that are asked for, of which each runs `script`. Returns the exit code."""
    config = parse(Config, sys.argv[1:])
    if is_worker():
        _end_rank(config)
    try:
        return launch(config, script, sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _end_rank(config: Config) -> NoReturn:
    from megatron_patch.training.worker import run as train

    try:
        code = train(config)
    except KeyboardInterrupt:  # before training takes note of signals; an exit code of 130 would say that it was saved
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    # Not sys.exit: after an error, other ranks may wait for this one, and threads that wait for them with it.
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    run(main)
