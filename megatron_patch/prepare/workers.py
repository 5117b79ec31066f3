"""Forked processes that share the parsed json and take shards one after another; each one's end is noticed."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from megatron_patch.data.processes import in_words, is_stopped

T = TypeVar("T")
Tell = Callable[[int], None]
"""Called with a number of samples that are done."""

INTERVAL = 1.0
"""Seconds between two looks at the processes. A conversion that is suspended as a whole takes none meanwhile."""
MAY_STAND = 30
"""Looks in a row that may find a process stopped."""
REMARK_AFTER = 60
"""Looks after which a process that says nothing is named, and again after as many. It may take as long as it needs."""
PART = 16384
"""Bytes that a process hands over at a time: the system takes them as a whole, so that nobody waits for the rest."""


def run(task: Callable[[int, Tell], T], shards: Sequence[int], num_workers: int) -> Generator[T | int, None, None]:
    """`task(shard, tell)` for each shard, in any order: yields the results, and what `tell` is told as it comes.

    An exception of a task ends it, and with it the other processes. So does closing the iterator. ValueError, OSError
    and MemoryError come as they are, and all others as a ValueError.
    """
    shards = list(shards)
    if min(num_workers, len(shards)) <= 1:
        yield from _run_here(task, shards)
        return
    # Garbage collection would write to every page of what the processes share, and so copy it.
    gc.freeze()
    context = multiprocessing.get_context("fork")
    workers: list[_Worker] = []
    try:
        for number in range(min(num_workers, len(shards))):
            here, there = context.Pipe()
            ends = [*(worker.pipe for worker in workers), here]
            process = context.Process(target=_serve, args=(task, there, ends), daemon=True)
            try:
                process.start()
            except OSError as error:  # a container's limit, or memory
                reason = error.strerror or error
                raise ValueError(
                    f"process {number + 1} of {num_workers} cannot be started: {reason}; use fewer --workers"
                ) from None
            workers.append(_Worker(process, here))
            there.close()
        yield from _hand_out(shards[::-1], workers)
    finally:
        for worker in workers:
            worker.process.kill()  # one that is still forking answers SIGTERM with the parent's handler
        for worker in workers:
            worker.process.join()
        gc.unfreeze()


def _run_here(task: Callable[[int, Tell], T], shards: list[int]) -> Iterator[T | int]:
    for shard in shards:
        told: list[int] = []
        try:
            result = task(shard, told.append)
        except Exception as error:
            raise _known(error, shard) from error
        yield sum(told)
        yield result


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    shard: int = -1
    silent: int = 0
    """Looks since it said something."""
    stopped: int = 0
    """Looks in a row that found it stopped."""
    parts: list[bytes] = field(default_factory=list)

    def give(self, shard: int) -> None:
        """Have it work on a shard."""
        self.shard, self.silent = shard, 0
        with self._alive():
            self.pipe.send(shard)

    def take(self) -> list[Any]:
        """The answer that it has handed over, if that is whole now. Raises what the task raised."""
        with self._alive():
            part = self.pipe.recv_bytes()
        self.silent = 0
        self.parts.append(part)
        if part:
            return []
        # Of this process's own child, through a pipe that has no name.
        answer, self.parts = pickle.loads(b"".join(self.parts)), []
        if isinstance(answer, BaseException):
            raise answer
        return [answer]

    def look(self) -> None:
        """Raises ValueError where it has been stopped for too long."""
        self.silent += 1
        self.stopped = self.stopped + 1 if is_stopped(self.pid) else 0
        if self.stopped >= MAY_STAND:
            raise ValueError(
                f"a process of the conversion (pid {self.pid}, in shard {self.shard}) was stopped for "
                f"{self.stopped * INTERVAL:.0f} seconds (by SIGSTOP, a debugger or a cluster's suspend), and is "
                f"killed; the same command goes on"
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self.process.pid is not None, "it was started"
        return self.process.pid

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            raise ValueError(
                "a process of the conversion was killed (out of memory?); the same command goes on"
            ) from None


def _hand_out(left: list[int], workers: list[_Worker]) -> Iterator[Any]:
    busy = {worker.pipe: worker for worker in workers}
    for worker in workers:
        worker.give(left.pop())
    next_look = time.monotonic() + INTERVAL
    while busy:
        ready: list[Any] = multiprocessing.connection.wait(list(busy), max(0.0, next_look - time.monotonic()))
        for pipe in ready:
            for answer in busy[pipe].take():
                if not isinstance(answer, int):
                    if left:
                        busy[pipe].give(left.pop())
                    else:
                        del busy[pipe]
                yield answer
        if time.monotonic() >= next_look:
            _look(busy.values())
            next_look = time.monotonic() + INTERVAL


def _look(workers: Iterable[_Worker]) -> None:
    for worker in workers:
        worker.look()
    silent = max(workers, key=lambda worker: worker.silent, default=None)
    if silent is not None and silent.silent and silent.silent % REMARK_AFTER == 0:
        pid = silent.pid
        begin = "\n" if sys.stderr.isatty() else ""  # after the line that counts
        with contextlib.suppress(OSError):  # nobody reads it
            print(
                f"{begin}process {pid} ({in_words(pid)}) has said nothing of shard {silent.shard} for "
                f"{silent.silent * INTERVAL:.0f} seconds, and is waited for; look at it and at the file system",
                file=sys.stderr,
                flush=True,
            )


def _serve(task: Callable[[int, Tell], Any], pipe: Connection, parents_ends: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in parents_ends:
        end.close()  # or this process would not see that the parent is gone
    try:
        while True:
            shard = pipe.recv()
            try:
                answer = pickle.dumps(task(shard, lambda samples: _send(pipe, pickle.dumps(samples))))
            except Exception as error:
                answer = _packed(error, shard)
            _send(pipe, answer)
    except (EOFError, ConnectionError):
        return


def _send(pipe: Connection, answer: bytes) -> None:
    for begin in range(0, len(answer), PART):
        pipe.send_bytes(answer[begin : begin + PART])
    pipe.send_bytes(b"")


def _packed(error: Exception, shard: int) -> bytes:
    """An exception that the parent can read, and knows."""
    error = _known(error, shard)
    try:
        answer = pickle.dumps(error)
        pickle.loads(answer)  # what was written here, to see whether the parent can
    except Exception:  # of any class: an exception's own code runs in both
        return pickle.dumps(ValueError(" ".join(str(error).split())))
    return answer


def _known(error: Exception, shard: int) -> Exception:
    if isinstance(error, (ValueError, OSError, MemoryError)):
        return error
    return ValueError(f"shard {shard}: {type(error).__name__}: {' '.join(str(error).split())}")
