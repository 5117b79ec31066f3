"""Where messages go: a run's to the terminal and a file, everybody else's to the file."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from pathlib import Path

from megatron_patch.files.terminal import Outliving

logger = logging.getLogger("megatron_patch")


def start_log(folder: Path, rank: int) -> None:
    """Send all that this rank says to `folder`/rank_XXX.log, and rank 0's messages to the terminal too.

    What libraries, the processes that read data and the kernel's faults print goes to the file alone: the terminal has
    one line per event, and the launcher says there what ended the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / f"rank_{rank:03d}.log")
    handlers: list[logging.Handler] = [file]
    if rank == 0:
        handlers.append(logging.StreamHandler(Outliving(os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1))))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        assert file.stream is not None, "opened at once"
        os.dup2(file.stream.fileno(), stream.fileno())
    faulthandler.enable()
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        handler.setLevel(logging.INFO)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = handlers
    # Other libraries' remarks go to the rank's file alone.
    logging.getLogger().handlers = handlers[:1]
    logging.captureWarnings(True)
