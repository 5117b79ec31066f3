"""How steps are timed: on the host's clock and, on a GPU, by events on the device."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from contestants import Contestant
from inputs import Batch

WARM_UPS = 2
"""Passes over all batches before anything is measured: plans, recompilation, the allocator's growth are per shape."""


@dataclass
class Result:
    """One contestant's steps."""

    seconds: list[float] = field(default_factory=list)
    """Of each measured step, of all rounds, on the host's clock."""
    cpu_seconds: list[float] = field(default_factory=list)
    """What these steps took of all cores together: on a machine that others use too, the steadier figure."""
    device_seconds: list[float] = field(default_factory=list)
    """The same steps between two events on the GPU; empty without one."""
    losses: list[float] = field(default_factory=list)
    """Of the first steps from the same weights."""
    peak_bytes: int = 0
    """Largest memory of tensors on the GPU, of this contestant alone."""
    problem: str = ""
    """Why there are no figures."""

    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.device_seconds or self.seconds)


@contextlib.contextmanager
def timed(result: Result) -> Iterator[None]:
    """Add the block to what was measured."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
    start, cpu_start = time.perf_counter(), time.process_time()
    yield
    if has_gpu:
        last.record()
        torch.cuda.synchronize()
        result.device_seconds.append(first.elapsed_time(last) / 1000)
    result.seconds.append(time.perf_counter() - start)
    result.cpu_seconds.append(time.process_time() - cpu_start)


class Memory:
    """What one contestant of several takes on the GPU: what it holds between its steps, and the most during them."""

    def __init__(self) -> None:
        self.held = 0

    @contextlib.contextmanager
    def watch(self, result: Result | None = None) -> Iterator[None]:
        """While this contestant is built or takes its steps, of which `result` is told."""
        others = allocated_bytes() - self.held
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        yield  # after an error, what its frames still hold is not counted
        self.held = allocated_bytes() - others
        if result is not None and torch.cuda.is_available():
            result.peak_bytes = max(result.peak_bytes, torch.cuda.max_memory_allocated() - others)


def allocated_bytes() -> int:
    """Of tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


@contextlib.contextmanager
def out_of_memory_told(result: Result) -> Iterator[None]:
    """Where the block runs out of the GPU's memory, `result` says so."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        result.problem = f"out of memory: {str(error).splitlines()[0]}"[:200]
    if result.problem:
        release()


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def warm_up(contestant: Contestant, batches: Sequence[Sequence[Batch]]) -> list[float]:
    """Take the steps of all `batches` twice; returns the losses of the first pass, from the first weights."""
    if contestant.start is not None:
        contestant.reset()
    first, *_ = [[contestant.step(*micro_batches) for micro_batches in batches] for _ in range(WARM_UPS)]
    return first


def measure(contestant: Contestant, batches: Sequence[Sequence[Batch]], steps: int, memory: Memory) -> Result:
    """Warm up over all batches, then measure `steps` steps on them in turn.

    `batches`: the micro batches of each step.
    """
    result = Result()
    with out_of_memory_told(result), memory.watch(result):
        result.losses = warm_up(contestant, batches)
        for index in range(steps):
            with timed(result):
                contestant.step(*batches[index % len(batches)])
    result.peak_bytes = max(0, result.peak_bytes - contestant.kept_bytes)
    return result
