"""Processes, their groups and devices, and the seeds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_patch.config.train import Parallel


@dataclass(frozen=True)
class HostGroups:
    """Ranks that hand each other what lies in main memory, over gloo; None where this rank is alone.

    They are for the thread of `training/feed.py` alone: messages of two threads would take each other's place.
    """

    sharing: dist.ProcessGroup | None = None
    """The tensor- and context-parallel ranks that take the same micro batches."""
    replica: dist.ProcessGroup | None = None
    """All ranks of one copy of the model, where it has several pipeline stages."""


_host_groups = HostGroups()


def start(parallel: Parallel, seed: int, timeout_minutes: int = 10, init_method: str | None = None, **rank) -> None:
    """Join the other processes (NCCL on GPUs, gloo without) and divide them into megatron.core's groups.

    Rank, size and address come from torchrun's environment, or from `init_method`, `rank=` and `world_size=`.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # fp32 is fp32: cuDNN would round what it convolves to TF32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=init_method,
        timeout=timedelta(minutes=timeout_minutes),
        **rank,
    )
    chunks = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=timeout_minutes,  # else its groups have defaults of their own
    )
    _make_host_groups(timedelta(minutes=timeout_minutes))
    # Megatron-LM's rule: otherwise the layers of all pipeline stages would begin with the same weights.
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)


def stop() -> None:
    """Leave the groups, so that the process can end or join others."""
    global _host_groups
    _host_groups = HostGroups()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def host_groups() -> HostGroups:
    """What `start` made."""
    return _host_groups


def _make_host_groups(timeout: timedelta) -> None:
    """Make all ranks' groups, as every rank must, and keep this one's."""
    global _host_groups
    mine = dist.get_process_group_ranks(parallel_state.get_tensor_and_context_parallel_group())
    size, world_size = len(mine), dist.get_world_size()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    # megatron.core's order: ranks that share layers and sequences are neighbours, and a stage is a run of ranks.
    stride = world_size // stages
    sharing = [list(range(first, first + size)) for first in range(0, world_size, size)]
    assert mine in sharing, f"unexpected order of ranks: {mine}"
    replicas = [
        [stage * stride + first + i for stage in range(stages) for i in range(size)] for first in range(0, stride, size)
    ]

    def make(groups: list[list[int]]) -> dist.ProcessGroup | None:
        made = [dist.new_group(ranks, timeout=timeout, backend="gloo") for ranks in groups if len(ranks) > 1]
        return next((group for group in made if isinstance(group, dist.ProcessGroup)), None)

    _host_groups = HostGroups(sharing=make(sharing), replica=make(replicas) if stages > 1 else None)


def free_memory() -> int | None:
    """Bytes that are free on this process's GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    # What torch keeps of tensors that are gone, such as the weights from before DDP's buffers, counts as used.
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
