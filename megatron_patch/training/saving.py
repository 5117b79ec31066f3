"""Saves a run: weights, optimizer, progress and place in the data, in megatron.core's torch_dist format.

A checkpoint is written aside, and named by the tracker only when every rank's part of it is on the disk.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_patch.config.train import Config
from megatron_patch.conversion.companions import TRACKER
from megatron_patch.files.marks import MARK, beside, claim, discard, is_ours, release
from megatron_patch.files.names import RUN_CONFIG
from megatron_patch.files.whole import write_whole
from megatron_patch.model.llava import LlavaModel
from megatron_patch.stores import checksums
from megatron_patch.tensor_io import disk
from megatron_patch.training.resume import Progress, agree, model_state, optimizer_state, position_file, saved

logger = logging.getLogger(__name__)
# It takes our mark in the folder for the remains of another checkpoint.
logging.getLogger(serialization.__name__).addFilter(lambda record: not record.getMessage().startswith("Overwriting"))

TORCH_WRITER = "inline_container"
"""What torch's errors name when writing fails: no cause, but positions in a C++ source."""
WRITER_FAILED = "torch could not write a file; is the disk full?"


class Saver:
    """Saves one checkpoint at a time; with --async-save, while training goes on. All ranks call every method together.

    Every rank's state is copied to host memory, and a process forked from it writes the copy (on a CPU, what is forked
    is the copy). Where a rank raises OSError, all do, what was written so far is gone, and the former checkpoint stays.
    """

    def __init__(self, config: Config, chunks: list[LlavaModel], optimizer: MegatronOptimizer) -> None:
        self.config = config
        self.chunks = chunks
        self.optimizer = optimizer
        self.queue = AsyncCallsQueue()
        self.target = self.partial = config.checkpoint.folder
        self.seconds = 0.0  # that training waited for the save under way

    def save(self, progress: Progress, position: bytes | None) -> None:
        """Write a checkpoint, or begin to.

        `position`: this data-parallel rank's place in the data, given by exactly one rank of each (None: by another).
        """
        self.wait()
        start = time.perf_counter()
        self.target = self.config.checkpoint.folder / f"iter_{progress.iteration:07d}"
        self.partial = self.target.with_name(f"{self.target.name}.partial")
        self._guard(lambda: self._start(progress, position))
        self.seconds = time.perf_counter() - start
        if not self.config.checkpoint.async_save:
            self._log()

    def poll(self) -> None:
        """Finish the save under way when every rank has written its part."""
        self._finish(blocking=False)

    def wait(self) -> None:
        """Wait for the save under way and finish it."""
        self._finish(blocking=True)

    def _start(self, progress: Progress, position: bytes | None) -> None:
        agree(_make_empty, self.partial, rank=0)
        written: dict[Path, bytes] = {}  # by this process itself
        if position is not None:
            written[position_file(self.partial, parallel_state.get_data_parallel_rank())] = position
        agree(lambda: [path.write_bytes(content) for path, content in written.items()])
        model = model_state(self.chunks)
        request = dist_checkpointing.save(
            {
                **model,
                "optimizer": optimizer_state(self.optimizer, model, is_loading=False),
                "progress": dataclasses.asdict(progress),
            },
            str(self.partial),
            # Of what all data-parallel ranks have, each writes a share.
            FullyParallelSaveStrategyWrapper(
                get_default_save_sharded_strategy(),
                parallel_state.get_data_parallel_group_gloo(with_context_parallel=True),
            ),
            async_sharded_save=True,
        )
        sums = os.fdopen(os.memfd_create("checksums"), "r+")  # shared with the process that writes
        if request.async_fn is not None:
            request = request._replace(async_fn=functools.partial(_write, request.async_fn, sums))
        request.finalize_fns.insert(0, lambda: agree(_written))
        request.add_finalize_fn(lambda: self._publish(sums, [*written]))
        if self.config.checkpoint.async_save:
            if request.async_fn is not None:
                request = request._replace(preload_fn=functools.partial(_stage, request.async_fn_args[1]))
            self.queue.schedule_async_request(request)
        else:
            _execute(request)

    def _finish(self, blocking: bool) -> None:
        if self.queue.get_num_unfinalized_calls():
            start = time.perf_counter()
            finished = self._guard(lambda: self.queue.maybe_finalize_async_calls(blocking=blocking))
            self.seconds += time.perf_counter() - start
            if finished:
                self._log()

    def _publish(self, sums: Any, written: list[Path]) -> None:
        """Data, folder, rename, folder, tracker: each on the disk before the next."""
        disk.reached("state written")
        sums.seek(0)
        mine = json.loads(sums.read() or "{}") | checksums.digests(written)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        agree(self._complete, {name: digest for part in parts for name, digest in part.items()}, rank=0)

    def _complete(self, sums: dict[str, str]) -> None:
        """Rank 0's part of it. `sums`: of the files that the ranks wrote."""
        (self.partial / RUN_CONFIG).write_text(json.dumps(dataclasses.asdict(self.config), default=str, indent=2))
        checksums.write(
            self.partial,
            {**sums, **checksums.digests(path for path in self.partial.iterdir() if path.name not in {*sums, MARK})},
        )
        disk.sync_tree(self.partial)
        disk.reached("synced")
        former = _make_room(self.target)
        self.partial.rename(self.target)
        release(self.target)
        if former is not None:
            shutil.rmtree(former, ignore_errors=True)
        disk.reached("renamed")
        disk.sync(self.target.parent)
        disk.sync(self.target)
        tracker = self.target.parent / TRACKER
        write_whole(tracker, str(int(self.target.name.removeprefix("iter_"))))
        disk.reached("tracker renamed")
        disk.sync(tracker.parent)
        if self.config.checkpoint.keep_checkpoints is not None:
            # Later ones are of a run that was set back by hand.
            before = [path for path in saved(tracker.parent) if path <= self.target]
            for old in before[: -self.config.checkpoint.keep_checkpoints]:
                _remove_old(old)

    def _guard(self, action: Callable[[], Any]) -> Any:
        """Do it. Whatever keeps a rank from writing its part becomes an OSError of one line."""
        try:
            try:
                return action()
            except CheckpointException as error:  # rank 0's knows why
                agree(_raise_first, error)
            except RuntimeError as error:
                if TORCH_WRITER in str(error):
                    raise OSError(WRITER_FAILED) from error
                raise
        except OSError as error:
            if dist.get_rank() == 0 and is_ours(self.partial):
                discard(self.partial)
            raise OSError(
                f"{self.target}: cannot be saved ({error}); the checkpoints before it are whole, and the same command "
                f"goes on from the last of them"
            ) from error

    def _log(self) -> None:
        logger.info(f"saved {self.target}, training waited {self.seconds:.1f} s")


def _written() -> None:
    """This rank's part is on its disk. What megatron.core waits in next ends after --distributed-timeout-minutes."""


def _stage(buckets: list[tuple]) -> list[tuple]:
    """Copy to host memory. What is there and pinned too: a forked process would see the trainer change it."""
    staged = []
    for path, key, (objects, tensors) in buckets:
        tensors = [(item, tensor.clone() if tensor.is_pinned() else tensor) for item, tensor in tensors]
        staged.append((path, key, (objects, tensors)))
    return FileSystemWriterAsync.preload_tensors(staged)


def _execute(request: AsyncRequest) -> None:
    """Write and finish it in this process.

    As `execute_sync`, but for its barrier, and for the pinned memory that it copies to: torch would never give it back.
    """
    if request.async_fn is not None:
        rank, buckets, results = request.async_fn_args
        request.async_fn(rank, FileSystemWriterAsync.preload_tensors(buckets, non_blocking=False), results)
    for finish in request.finalize_fns:
        finish()


def _write(write: Callable[..., None], sums: Any, rank: int, buckets: list[tuple], results: Any) -> None:
    """megatron.core's write function, and the sums of the files that it wrote."""
    write(rank, buckets, results)
    try:
        json.dump(checksums.digests(Path(path) for path, _, _ in buckets), sums)
        sums.flush()
    except FileNotFoundError:
        pass  # `results` says why it was not written


def _raise_first(error: CheckpointException) -> None:
    """Raise what a writing process came upon, if this rank was told."""
    for cause, _ in error.failures.values():
        text = str(cause)
        if "results_queue" in text:
            raise OSError("a process that writes was killed")
        raise OSError(WRITER_FAILED if TORCH_WRITER in text else text.removeprefix("Worker failure: "))


def _make_empty(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    claim(folder)


def _make_room(target: Path) -> Path | None:
    """Have nothing at the name of an iteration: a run was killed just before the tracker, or was set back.

    Returns where a run's is now, to be removed when the new one has its name; the tracker may name it. What no run
    wrote, and a link, stays under another name.
    """
    if not target.is_symlink() and (target / RUN_CONFIG).is_file():
        return target.rename(beside(target))
    if target.is_symlink() or target.exists():
        kept = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}")
        target.rename(kept)
        logger.warning(f"{target}: was there, and no run wrote it; it is {kept.name} now")
    return None


def _remove_old(checkpoint: Path) -> None:
    """Remove a checkpoint that is not to be kept. What cannot be, or was not written there by a run, stays."""
    if checkpoint.is_symlink() or not (checkpoint / RUN_CONFIG).is_file():
        logger.warning(f"{checkpoint}: kept, since it is a link or no run's; --keep-checkpoints removes no other")
        return
    try:
        shutil.rmtree(checkpoint)
    except OSError as error:
        logger.warning(
            f"{checkpoint}: cannot be removed ({error.strerror or error}); remove what is left of it by hand"
        )
