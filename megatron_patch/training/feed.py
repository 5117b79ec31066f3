"""Hands an iteration's micro batches to the ranks that take them, in a thread, while the model computes.

Tensor- and context-parallel ranks take the same micro batches, which the first of them reads. Pipeline stages compute
on one length, that of the iteration's longest micro batch: so no message between them needs its shape told. All of it
goes over gloo, from main memory to main memory. The thread ends with the iteration and never reads past it, so that
the place in the data is that of what was trained.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_patch.data.task_encoder import Batch
from megatron_patch.model.groups import HostGroups

AHEAD = 2
"""Micro batches that wait for the model."""


class Feed:
    """One iteration's micro batches on this rank, an iterator that knows how long it was waited for.

    Args:
        batches: what this rank reads; only asked where it is the first of those that share micro batches.
        num_micro_batches: how many an iteration has.
        groups: see `groups.host_groups`.
        takes: whether this rank's stage takes micro batches at all.
        takes_pixels: whether it takes their images; without, `pixels` is [n, 3, 0, 0].
        device: where the model is; for a GPU what is handed over lies in pinned memory.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        num_micro_batches: int,
        groups: HostGroups,
        *,
        takes: bool,
        takes_pixels: bool,
        device: torch.device,
    ) -> None:
        self.seconds = 0.0
        """How long it was waited for."""
        self._batches, self._count, self._groups, self._device = batches, num_micro_batches, groups, device
        self._takes, self._takes_pixels = takes, takes_pixels
        self._reads = takes and (groups.sharing is None or groups.sharing.rank() == 0)
        self._ready: queue.Queue[Any] = queue.Queue(AHEAD)
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[int | None]:
        """Read within this context; gives the length of the iteration's longest micro batch, None without stages."""
        if self._groups.sharing is None and self._groups.replica is None:
            yield None
            return
        self._thread = threading.Thread(target=self._run, name="micro batches", daemon=True)
        self._thread.start()
        try:
            yield None if self._groups.replica is None else self._next()
            self._thread.join()  # all that it had to hand over was taken
        finally:
            self._is_closed.set()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._next() if self._thread is not None else self._timed(self._read)

    def _next(self) -> Any:
        item = self._timed(self._ready.get)
        if isinstance(item, BaseException):
            raise item
        return item

    def _timed(self, get: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        item = get()
        self.seconds += time.perf_counter() - start
        return item

    def _run(self) -> None:
        """The thread. What it raises is raised where the next micro batch is asked for."""
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a thread begins with the first
            self._hand_over()
        except BaseException as error:
            self._put(error)

    def _hand_over(self) -> None:
        """With stages the longest length, then the micro batches."""
        read: deque[Batch] = deque()
        if self._groups.replica is not None:
            self._put(self._agree(read, self._groups.replica))
        for _ in range(self._count if self._takes else 0):
            batch, error = None, None
            if self._reads and not read:
                batch, error = self._try_to_read()
            elif self._reads:
                batch = read.popleft()
            if self._groups.sharing is not None:
                batch = self._share(batch, error)
            elif error is not None:
                raise error
            self._put(batch)

    def _agree(self, read: deque[Batch], replica: dist.ProcessGroup) -> int:
        """Read all of the iteration; the longest length of all stages. Raises on all what one could not read."""
        error = None
        while self._reads and len(read) < self._count and error is None:
            batch, error = self._try_to_read()
            read.extend([] if batch is None else [batch])
        longest = max((batch.labels.shape[1] for batch in read), default=0)
        everything: list[Any] = [None] * replica.size()
        dist.all_gather_object(everything, (longest, error and _in_words(error)), replica)
        if error is not None:
            raise error
        for _, words in everything:
            if words is not None:
                raise ValueError(words)
        return max(longest for longest, _ in everything)

    def _try_to_read(self) -> tuple[Batch | None, Exception | None]:
        try:
            return self._read(), None
        except Exception as error:
            return None, error

    def _put(self, item: Any) -> None:
        is_put = False
        while not (is_put or self._is_closed.is_set()):
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.2)
                is_put = True

    def _read(self) -> Batch:
        batch = next(self._batches)
        return (
            batch if self._takes_pixels else replace(batch, pixels=batch.pixels.new_empty((len(batch.pixels), 3, 0, 0)))
        )

    def _share(self, batch: Batch | None, error: Exception | None) -> Batch:
        """The first rank's batch, on all ranks that share it; or what it could not read, raised on all."""
        group, data = self._groups.sharing, None
        if error is not None:
            data = torch.frombuffer(bytearray(_in_words(error).encode()), dtype=torch.uint8)
        elif batch is not None:
            data = to_bytes(batch)
        head = torch.tensor([0 if data is None else len(data), error is not None])
        dist.broadcast(head, group=group, group_src=0)
        size, is_error = head.tolist()
        if data is None:
            data = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        dist.broadcast(data, group=group, group_src=0)
        if error is not None:
            raise error
        if is_error:
            raise ValueError(data.numpy().tobytes().decode())
        return from_bytes(data) if batch is None else batch


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def to_bytes(batch: Batch) -> Tensor:
    """The batch as uint8 [bytes]: the length of a head, the head in JSON, then the tensors as they lie."""
    head = {
        "keys": batch.keys,
        "text": list(batch.labels.shape),
        "pixels": list(batch.pixels.shape),
        "num_truncated": batch.num_truncated,
        "segment_lengths": batch.segment_lengths,
    }
    said = json.dumps(head).encode()
    said += b" " * (-len(said) % 8)  # int64 lies at multiples of 8
    parts = (
        torch.tensor([len(said)]).view(torch.uint8),
        torch.frombuffer(bytearray(said), dtype=torch.uint8),
        *(text.contiguous().flatten().view(torch.uint8) for text in (batch.input_ids, batch.labels)),
        batch.pixels.contiguous().flatten(),
    )
    return torch.cat(parts)


def from_bytes(data: Tensor) -> Batch:
    """What `to_bytes` made; its tensors are views of `data`."""
    start = 8 + int(data[:8].view(torch.int64))
    head = json.loads(data[8:start].numpy().tobytes())
    size = 8 * head["text"][0] * head["text"][1]
    ids, labels, pixels = data[start:].tensor_split([size, 2 * size])
    return Batch(
        keys=head["keys"],
        input_ids=ids.view(torch.int64).view(head["text"]),
        labels=labels.view(torch.int64).view(head["text"]),
        pixels=pixels.view(head["pixels"]),
        num_truncated=head["num_truncated"],
        segment_lengths=head["segment_lengths"],
    )
