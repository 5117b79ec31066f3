"""One process of a training run, from its start to its exit code."""

from __future__ import annotations

import logging
import os

from megatron_patch.config import Config
from megatron_patch.files import STORE
from megatron_patch.training.log import start_log

EXPECTED = (ValueError, OSError, FloatingPointError)
"""What says in one line what is wrong."""


def run(config: Config) -> int:
    """Train and return the exit code. What ended the run goes to the launcher, its traceback into the rank's log."""
    rank = int(os.environ["RANK"])
    try:
        start_log(config.checkpoint.output / "log", rank)
    except OSError as error:
        _tell_launcher(f"{error.filename}: cannot be written ({error.strerror}); move what is there away")
        return 1
    # Here, so that what libraries remark while they are loaded goes to the log.
    from megatron_patch import parallel
    from megatron_patch.training import peers
    from megatron_patch.training.loop import train
    from megatron_patch.training.stopping import end_with_parent, lock

    end_with_parent()
    peers.watch()
    try:
        # Held until this process ends.
        held = lock(config.checkpoint.folder) if rank == 0 else None
        parallel.start(
            config.parallel,
            config.training.seed,
            config.training.distributed_timeout_minutes,
            init_method=os.environ[STORE],
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        mark = peers.mark_path()
        mark.write_text(str(os.getpid()))
        code = train(config)
        mark.unlink()
        parallel.stop()
        if held is not None:
            held.close()
    except Exception as error:
        logging.getLogger().error("stopped", exc_info=True)
        if not _others_are_gone(error):
            line = _line(error)
            _tell_launcher(line)
            peers.tell(line)
        return 1
    return code


def _others_are_gone(error: Exception) -> bool:
    """Whether this rank only lost the others, of which one knows why."""
    from torch.distributed import DistError

    return not isinstance(error, EXPECTED) and (isinstance(error, DistError) or "gloo" in str(error))


def _line(error: Exception) -> str:
    """What ends the run, in one line."""
    line = " ".join(str(error).split())
    if not isinstance(error, EXPECTED):
        line = f"{type(error).__name__}: {line[:300]}; its traceback is in the rank's log"
    return line


def _tell_launcher(line: str) -> None:
    """Hand it what ends the run, in torchrun's way; it prints the line once however many ranks have it."""
    from torch.distributed.elastic.multiprocessing.errors.handlers import get_error_handler

    get_error_handler().record_exception(RuntimeError(line))
