"""Where messages go: a run's to the terminal and a file, everybody else's to the file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

logger = logging.getLogger("megatron_patch")


def start_log(folder: Path, rank: int) -> None:
    """Send every rank's messages to `folder`/rank_XXX.log, and rank 0's to the terminal too."""
    folder.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(folder / f"rank_{rank:03d}.log")]
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        handler.setLevel(logging.INFO)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = handlers
    # Other libraries' remarks go to the rank's file alone.
    logging.getLogger().handlers = handlers[:1]
    logging.captureWarnings(True)
