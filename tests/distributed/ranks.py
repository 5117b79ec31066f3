"""Real processes for tests: gloo or NCCL, a `file://` store (no ports to collide on), results handed back by rank."""

from __future__ import annotations

import gc
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from megatron_patch.config.train import Parallel
from megatron_patch.model import groups
from tests.forked import in_server

Job = tuple[Callable[..., Any], Parallel, tuple]
"""A function, how its processes are cut, its arguments."""


def run_ranks(function: Callable[..., Any], sizes: Parallel, world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` processes cut by `sizes`; what each returned, in the order of ranks."""
    (results,) = run_jobs([(function, sizes, args)], world_size)
    return results


def run_jobs(jobs: Sequence[Job], world_size: int) -> list[list[Any]]:
    """One job after another on the same processes, since starting one takes seconds; for each what the ranks returned.

    A single process is this one: starting another takes longer than most of what it would do. On a machine with GPUs,
    each process needs one of its own: NCCL shares none.
    """
    if torch.cuda.is_available() and world_size > torch.cuda.device_count():
        pytest.skip(f"needs {world_size} GPUs")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, Path(folder), list(jobs))
        if world_size == 1:
            _rank(0, {}, *arguments)
        elif torch.cuda.is_available():  # its driver may be in use where processes are forked from
            _start("spawn", dict(os.environ), *arguments)
        else:
            in_server(_start, "fork", dict(os.environ), *arguments)
        # Anything that a test's function returns, from processes of its own.
        by_rank = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]
        return [list(results) for results in zip(*by_rank, strict=True)]


def _start(method: str, variables: dict[str, str], world_size: int, folder: Path, jobs: Sequence[Job]) -> None:
    mp.start_processes(_rank, (variables, world_size, folder, jobs), nprocs=world_size, start_method=method)


def _rank(rank: int, variables: dict[str, str], world_size: int, folder: Path, jobs: Sequence[Job]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    results = []
    for number, (function, sizes, args) in enumerate(jobs):
        init_method = f"file://{folder}/store{number}"
        groups.start(sizes, seed=1, timeout_minutes=2, init_method=init_method, rank=rank, world_size=world_size)
        results.append(function(*args))
        stop()
    (folder / str(rank)).write_bytes(pickle.dumps(results))


def stop() -> None:
    """`groups.stop`, after which nothing of the groups is left.

    megatron.core's wrapper and the hooks that it puts into autograd hold each other where garbage collection does not
    look. With the wrapper stays the model and with it its process groups, whose threads wake a hundred times a second:
    dozens of runs in one process would make each other slow.
    """
    from megatron.core.distributed import DistributedDataParallel  # not before megatron_patch

    groups.stop()
    for found in gc.get_objects():
        if type(found) is DistributedDataParallel:
            found.__dict__.clear()
    gc.collect()
    gc.freeze()  # so that the next collection looks at what is new
