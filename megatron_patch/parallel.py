"""Processes, their groups and devices, and the seeds."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_patch.config import Parallel


def start(parallel: Parallel, seed: int, timeout_minutes: int = 10, init_method: str | None = None, **rank) -> None:
    """Join the other processes (NCCL on GPUs, gloo without) and cut them into megatron.core's groups.

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
    )
    # Megatron-LM's rule: otherwise the layers of all pipeline stages would begin with the same weights.
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)


def stop() -> None:
    """Leave the groups, so that the process can end or join others."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


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
