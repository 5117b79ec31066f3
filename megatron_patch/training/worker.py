"""One process of a training run, from its start to its exit code."""

from __future__ import annotations

import logging
import os
import sys

from megatron_patch.config import Config
from megatron_patch.training.log import start_log


def run(config: Config) -> int:
    """Train and return the exit code. What a user can mend is one line on stderr, its traceback in the rank's log."""
    rank = int(os.environ["RANK"])
    start_log(config.checkpoint.output / "log", rank)
    # Here, so that what libraries remark while they are loaded goes to the log.
    from megatron_patch import parallel
    from megatron_patch.training.loop import train
    from megatron_patch.training.stopping import end_with_parent, lock

    end_with_parent()
    try:
        # Held until this process ends.
        held = lock(config.checkpoint.folder) if rank == 0 else None
        parallel.start(config.parallel, config.training.seed, config.training.distributed_timeout_minutes)
        code = train(config)
        parallel.stop()
        if held is not None:
            held.close()
    except (ValueError, OSError, FloatingPointError) as error:
        logging.getLogger().error("stopped", exc_info=True)
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        return 1
    return code
