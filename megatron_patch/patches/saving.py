"""What megatron.core 0.16.1 does needlessly or wrong when it saves a checkpoint, on every machine."""

from __future__ import annotations

import math
import os
import pickle
import queue
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from megatron_patch.patches import Repair


def no_process_for_results(module: ModuleType) -> None:
    """What was written is handed back in memory that the trainer shares with the process it forks to write.

    strategies/filesystem_async.py:51 starts a server process for the purpose, which imports the training script again
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


def own_states(module: ModuleType) -> None:
    """Each data-parallel rank saves the optimizer states that it has, from where they are, and loads no others.

    optimizer/distrib_optimizer.py:1447 gathers those of all ranks, in a bucket at a time, on the GPU of each rank, and
    keeps the whole, 12 bytes a weight, in the host memory of each (:1031), when loading too. With more than one bucket
    (overlapped gradients, tied embeddings over pipeline stages) it takes states from a wrong place besides (:1501,
    where padding counts that :1115 has left out), silently.

    A rank has a range of a flattened weight's states, which is a few boxes of the weight. The checkpoint's tensors are
    the same, in other blocks. Needed until `fully_reshardable` stores what each rank has.
    """

    def sharded_param_state(self, model_sharded_state_dict, is_loading=False, metadata=None):
        tensors, _ = module.extract_sharded_tensors_and_factories(model_sharded_state_dict)
        places = {tensor.data: tensor for tensor in module.nested_values(tensors)}
        states = {}
        for index, (parameter, part) in enumerate(_own_parts(self)):
            if is_loading:
                values = {name: torch.empty(part.size) for name in STATES}
            else:
                values = _own_values(self, parameter)
            states[index] = {
                name: _boxes(module, self, places[parameter], name, values[name], part.start) for name in STATES
            }
        return states

    @torch.no_grad()
    def load_parameter_state(self, state_dict):
        for index, (parameter, _) in enumerate(_own_parts(self)):
            boxes = state_dict[index]
            values = {name: torch.cat([box.flatten() for box in boxes[name]]) for name in STATES}
            self._set_main_param_and_optimizer_states(parameter, values)
        if isinstance(self.optimizer, module.HybridDeviceOptimizer):
            self.optimizer._sync_hdo_state_to_sub_optimizers()

    module.DistributedOptimizer.sharded_param_state_fully_reshardable = sharded_param_state
    module.DistributedOptimizer.load_parameter_state_from_fully_reshardable = load_parameter_state


STATES = ("param", "exp_avg", "exp_avg_sq")


def _own_parts(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """The weights of which this rank has states, and which range of the flattened weight that is."""
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, where in bucket["param_map"].items():
                    yield parameter, where["param"]


def _own_values(optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """This rank's fp32 weight and states of a weight, each flat; not copied where they are kept in fp32."""
    values = optimizer._get_main_param_and_optimizer_states(parameter)
    values = {name: values[name].detach().float() for name in STATES}
    if optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        # Made from what is kept in fewer bits: those of all weights would not fit on the device.
        values = {name: value.cpu() for name, value in values.items()}
    return values


def _boxes(module: ModuleType, optimizer: Any, place: Any, name: str, values: torch.Tensor, start: int) -> list:
    """`values`, which begin at `start` in the flattened weight, as blocks of the checkpoint's tensor.

    `place`: of the whole weight. The blocks are views.
    """
    whole = {"key": f"optimizer.state.{name}.{place.key}", "data": torch.empty(place.data.shape, device="meta")}
    if isinstance(place, module.ShardedTensorFactory):  # gate and up of a gated MLP
        tensors = list(module.nested_values(module.replace(place, **whole).build()))
    else:
        tensors = [module.replace(place, **whole, dtype=values.dtype)]
    boxes, taken = [], 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.data.storage_offset()):
        first, size = start - tensor.data.storage_offset(), tensor.data.numel()
        for offsets, shape in range_boxes(tensor.local_shape, max(first, 0), min(first + values.numel(), size)):
            leading = tensor.prepend_axis_num
            data = values[taken : taken + math.prod(shape)].view((1,) * leading + shape)
            taken += data.numel()
            inner = zip(tensor.global_offset[leading:], offsets, strict=True)
            box = module.replace(
                tensor,
                data=data,
                dtype=data.dtype,
                local_shape=tuple(data.shape),
                global_offset=(*tensor.global_offset[:leading], *(begin + offset for begin, offset in inner)),
                axis_fragmentations=None,
                prepend_axis_num=0,
                # No other data-parallel rank has it.
                replica_id=(*tensor.replica_id[:2], optimizer.distributed_optimizer_instance_id),
            )
            boxes.append(box)
    assert taken == values.numel(), (place.key, taken, values.numel())
    return boxes


def range_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A range of a flattened tensor as boxes of the tensor, in order: (offsets, sizes) of each."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        parts = [(last, start - last * row, stop - last * row)]
    else:
        parts = [(first - 1, start - (first - 1) * row, row), None, (last, 0, stop - last * row)]
    for part in parts:
        if part is not None:
            index, begin, end = part
            for offsets, sizes in range_boxes(shape[1:], begin, end):
                yield (index, *offsets), (1, *sizes)
        elif first < last:
            yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])


REPAIRS = (
    Repair(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        no_process_for_results,
        "_get_write_results_queue",
        "349269cbdd56",
    ),
    Repair(
        "megatron.core.optimizer.distrib_optimizer",
        own_states,
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        "e888c7cccb71",
    ),
)
