"""Real processes for tests: gloo, a `file://` store (no ports to collide on), results handed back by rank."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from megatron_patch import parallel
from megatron_patch.config import Parallel


def run_ranks(function: Callable[..., Any], sizes: Parallel, world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` processes cut by `sizes`; what each returned, in the order of ranks.

    A single process is this one: starting another takes longer than most of what it would do.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = (world_size, Path(folder), function, sizes, args)
        if world_size == 1:
            _rank(0, *job)
        else:
            mp.spawn(_rank, job, nprocs=world_size)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: Path, function: Callable, sizes: Parallel, args: tuple) -> None:
    torch.set_num_threads(1)
    init_method = f"file://{folder}/store"
    parallel.start(sizes, seed=1, timeout_minutes=2, init_method=init_method, rank=rank, world_size=world_size)
    result = function(*args)
    (folder / str(rank)).write_bytes(pickle.dumps(result))
    parallel.stop()
