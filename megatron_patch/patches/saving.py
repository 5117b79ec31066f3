"""What megatron.core 0.16.1 does needlessly or wrong when it saves a checkpoint, on every machine."""

from __future__ import annotations

import functools
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
    Repair("megatron.core.dist_checkpointing.strategies.filesystem_async", no_process_for_results),
    Repair("megatron.core.optimizer.distrib_optimizer", states_of_several_buckets),
)
