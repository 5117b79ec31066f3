"""What megatron.core 0.16.1 does needlessly or wrong when it saves a checkpoint, on every machine."""

from __future__ import annotations

import functools
import os
import pickle
import queue
from types import ModuleType
from typing import Any

from megatron_patch.patches import Repair


def no_process_for_results(module: ModuleType) -> None:
    """What was written is handed back in memory that the trainer shares with the process it forks to write.

    strategies/filesystem_async.py:51 starts a server process for the purpose, which imports the training script anew
    (seconds in the first save) and outlives a killed trainer, with its memory and its hold on the terminal.
    Needed as long as results pass through a multiprocessing.Manager.
    """
    module._get_write_results_queue = Results


class Results:
    """Holds one object, which this process or one forked from it puts in, of any size: no pipe that could fill up."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.memfd_create("write results"), "r+b")

    def put(self, results: Any) -> None:
        """Put it in."""
        pickle.dump(results, self.file)
        self.file.flush()

    def get_nowait(self) -> Any:
        """Take it. Raises queue.Empty when nothing was put in, by a process that was killed for instance."""
        self.file.seek(0)
        try:
            return pickle.load(self.file)  # of this process's own child, in memory that has no name
        except EOFError:
            raise queue.Empty from None


def states_of_several_buckets(module: ModuleType) -> None:
    """Optimizer states are cut out of the gathered buffer where they are in it.

    optimizer/distrib_optimizer.py:1501 takes each parameter's place in a buffer that still has the padding behind each
    bucket, which :1115 has left out. Silent but for a warning: with more than one bucket (overlapped gradients, tied
    embeddings over pipeline stages) all states behind the first are saved shifted by some elements, and a resumed run
    trains with wrong ones.
    """
    stock = module.DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(stock)
    def sharded_param_state(self, *args, **kwargs):
        places = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            buffer.param_index_map = _places_without_padding(buffer)
        try:
            return stock(self, *args, **kwargs)
        finally:
            for buffer, place in zip(self.buffers, places, strict=True):
                buffer.param_index_map = place

    module.DistributedOptimizer.sharded_param_state_fully_reshardable = sharded_param_state


def _places_without_padding(buffer) -> dict:
    paddings = [0]
    for bucket in buffer.buckets:
        paddings.append(paddings[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
    return {
        parameter: (start - paddings[bucket], end - paddings[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


REPAIRS = (
    Repair(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        no_process_for_results,
        "_get_write_results_queue",
        "349269cbdd56",
    ),
    Repair(
        "megatron.core.optimizer.distrib_optimizer",
        states_of_several_buckets,
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        "e888c7cccb71",
    ),
)
