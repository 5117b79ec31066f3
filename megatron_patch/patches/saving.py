"""What megatron.core 0.16.1 does needlessly when it saves a checkpoint, on every machine."""

from __future__ import annotations

import queue
from types import ModuleType

from megatron_patch.patches import Repair


def no_process_for_results(module: ModuleType) -> None:
    """What was written is collected in this process, where a synchronous save writes it.

    strategies/filesystem_async.py:51 starts a server process for the purpose, which imports the training script anew
    (seconds in the first save) and outlives a killed trainer, with its memory and its hold on the terminal.
    Needed as long as saves are synchronous.
    """
    results: queue.Queue = queue.Queue()
    module._get_write_results_queue = lambda: results


REPAIRS = (Repair("megatron.core.dist_checkpointing.strategies.filesystem_async", no_process_for_results),)
