"""Forked processes that share the parsed json and take shards one after another; each one's end is noticed."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Tell = Callable[[int], None]
"""Called with a number of samples that are done."""


def run(task: Callable[[int, Tell], T], shards: Sequence[int], num_workers: int) -> Iterator[T | int]:
    """`task(shard, tell)` for each shard, in any order: yields the results, and what `tell` is told as it comes.

    An exception of a task ends it, and with it the other processes. So does closing the iterator.
    """
    shards = list(shards)
    if min(num_workers, len(shards)) <= 1:
        yield from _run_here(task, shards)
        return
    # Garbage collection would write to every page of what the processes share, and so copy it.
    gc.freeze()
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    try:
        for number in range(min(num_workers, len(shards))):
            here, there = context.Pipe()
            pipes.append(here)
            process = context.Process(target=_serve, args=(task, there, pipes), daemon=True)
            try:
                process.start()
            except OSError as error:  # a container's limit, or memory
                raise ValueError(
                    f"process {number + 1} of {num_workers} cannot be started: {error.strerror}; use fewer --workers"
                ) from None
            processes.append(process)
            there.close()
        yield from _hand_out(shards[::-1], pipes)
    finally:
        for process in processes:
            process.kill()  # one that is still forking answers SIGTERM with the parent's handler
        for process in processes:
            process.join()
        gc.unfreeze()


def _run_here(task: Callable[[int, Tell], T], shards: list[int]) -> Iterator[T | int]:
    for shard in shards:
        told: list[int] = []
        result = task(shard, told.append)
        yield sum(told)
        yield result


def _hand_out(left: list[int], pipes: list[Any]) -> Iterator[Any]:
    busy = []
    for pipe in pipes:
        pipe.send(left.pop())
        busy.append(pipe)
    while busy:
        for pipe in multiprocessing.connection.wait(busy):
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                raise ValueError(
                    "a process of the conversion was killed (out of memory?); the same command goes on"
                ) from None
            if isinstance(answer, BaseException):
                raise answer
            if not isinstance(answer, int):
                if left:
                    pipe.send(left.pop())
                else:
                    busy.remove(pipe)
            yield answer


def _serve(task: Callable[[int, Tell], Any], pipe: Any, parents_ends: list[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in parents_ends:
        end.close()  # or this process would not see that the parent is gone
    try:
        while True:
            shard = pipe.recv()
            try:
                answer = task(shard, pipe.send)
            except Exception as error:
                answer = error
            pipe.send(answer)
    except (EOFError, BrokenPipeError):
        return
