"""Threads that hand pieces of work on: while one is written, the next is hashed, and the one after that is read."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Band = TypeVar("Band")


class Line(Generic[Band]):
    """Stages that bands pass through in order, each a thread. The first error stops them all and is raised here."""

    def __init__(self, stages: Sequence[Callable[[Band], None]], bands: Sequence[Band]) -> None:
        self.free: queue.SimpleQueue[Band] = queue.SimpleQueue()
        self.num_bands = len(bands)
        for band in bands:
            self.free.put(band)
        self.error: BaseException | None = None
        queues = [queue.SimpleQueue() for _ in stages]
        self.first = queues[0]
        self.threads = [
            threading.Thread(target=self._work, args=(stage, source, target), daemon=True)
            for stage, source, target in zip(stages, queues, [*queues[1:], self.free], strict=True)
        ]

    def __enter__(self) -> Line:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.error = self.error or error  # what is under way is not worth finishing
        self.first.put(None)
        for thread in self.threads:
            thread.join()

    def take(self) -> Band:
        """A band that is free. Waits for one."""
        band = self.free.get()
        if self.error is not None:
            raise self.error
        return band

    def put(self, band: Band) -> None:
        """Send a band on its way."""
        self.first.put(band)

    def finish(self) -> None:
        """Wait until all bands are through."""
        for _ in range(self.num_bands):
            self.take()

    def _work(self, stage: Callable[[Band], None], source: queue.SimpleQueue, target: queue.SimpleQueue) -> None:
        while (band := source.get()) is not None:
            if self.error is None:
                try:
                    stage(band)
                except BaseException as error:
                    self.error = error
            target.put(band)
        target.put(None)
