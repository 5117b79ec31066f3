"""One process of a training run, from its start to its exit code."""

from __future__ import annotations

import logging
import os
import re

from megatron_patch.config.train import Config
from megatron_patch.files.names import STORE
from megatron_patch.files.terminal import loading
from megatron_patch.training.log import start_log

EXPECTED = (ValueError, OSError, FloatingPointError)
"""What says in one line what is wrong."""
TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
OF_GLOO = re.compile(r"gloo|^Application timeout caused pair closure|^Wait timeout|^Timeout waiting for key")
"""What gloo and the stores say that raise no DistError."""


def run(config: Config) -> int:
    """Train and return the exit code. What ended the run goes to the launcher, its traceback into the rank's log."""
    rank = int(os.environ["RANK"])
    try:
        start_log(config.checkpoint.output / "log", rank)
    except OSError as error:
        _tell_launcher(f"{error.filename}: cannot be written ({error.strerror}); move what is there away")
        return 1
    # Here, so that what libraries remark while they are loaded goes to the log.
    with loading():
        from megatron_patch.model import groups
        from megatron_patch.training import peers
        from megatron_patch.training.loop import train
        from megatron_patch.training.stopping import end_with_parent, lock

    end_with_parent()
    peers.watch(config.training.distributed_timeout_minutes)
    try:
        # Held until this process ends.
        held = lock(config.checkpoint.folder) if rank == 0 else None
        groups.start(
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
        groups.stop()
        if held is not None:
            held.close()
    except Exception as error:
        logging.getLogger().error("stopped", exc_info=True)
        line = _line(error, config)
        if line is not None:
            _tell_launcher(line)
            peers.tell(line)
        return 1
    return code


def _line(error: Exception, config: Config) -> str | None:
    """What ends the run, in one line; None where this rank only lost the others, of which one knows why."""
    from torch.distributed import DistError

    line = " ".join(str(error).split())
    if isinstance(error, EXPECTED):
        return line
    if isinstance(error, DistError) or (isinstance(error, RuntimeError) and OF_GLOO.search(line)):
        if TIMED_OUT.search(line) is None:
            return None
        minutes = config.training.distributed_timeout_minutes
        return (
            f"waited {minutes} minutes (--distributed-timeout-minutes) for another rank, which hangs, is slower than "
            f"that, or was suspended; see the ends of the other ranks' logs in {config.checkpoint.output / 'log'}, and "
            f"start the same command again: it goes on from the save before"
        )
    return f"{type(error).__name__}: {line[:300]}; its traceback is in the rank's log"


def _tell_launcher(line: str) -> None:
    """Hand it what ends the run, in torchrun's way; it prints the line once however many ranks have it."""
    from torch.distributed.elastic.multiprocessing.errors.handlers import get_error_handler

    get_error_handler().record_exception(RuntimeError(line))
