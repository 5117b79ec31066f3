"""The processes that read samples: what is said where one is killed, stands still, or finds no room for its batches.

A batch's pixels are handed over in shared memory, which torch allocates in a thread of the reader: what goes wrong
there is only printed, and the batch is waited for. And nothing limits how long one is waited for, deep in queues and
sockets: what is waited for stands here, so that another thread can end the process when it is late.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron.energon.errors import FatalSampleError

from megatron_patch.data.private_api import on_lost_batch
from megatron_patch.data.processes import in_words

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
SHARE_OF_TIMEOUT = 0.8
"""Of --distributed-timeout-minutes, for a batch: its rank is to say what it waits for before the others give up."""
WHEN_STOPPING = 30.0
"""Seconds that a batch may take from the signal on that asked the run to stop."""
MORE_ROOM = (
    "shared memory (/dev/shm) is full: give it more (docker's --shm-size), or use a smaller --micro-batch-size or "
    "fewer --num-workers"
)

_is_stopping: Callable[[], bool] | None = None
_waits: dict[int, Wait] = {}  # by thread


def hurry_when(is_stopping: Callable[[], bool]) -> None:
    """From now on, a batch may take `WHEN_STOPPING` seconds from when this gives true."""
    global _is_stopping
    _is_stopping = is_stopping


def begin(begin_worker: Callable[[int], None], dataset: Path, number: int) -> None:
    """A reader's first step. What it cannot hand over, it says instead of it. `begin_worker`: energon's own step."""
    begin_worker(number)

    def explain(error: Exception) -> FatalSampleError:
        reason = " ".join(str(error).split()) or type(error).__name__
        advice = MORE_ROOM if "shared memory" in reason else "use fewer --num-workers"
        return FatalSampleError(f"{dataset}: a process that reads could not hand over a batch ({reason}); {advice}")

    on_lost_batch(explain)


def is_hurried() -> bool:
    """Whether a signal asked the run to stop, as far as this process knows."""
    return _is_stopping is not None and _is_stopping()


@dataclass
class Wait:
    """A thread waits for a reader."""

    dataset: Path
    what: str
    """What of it did not come."""
    seconds: float
    """How long it may take."""
    reader: Callable[[], tuple[int, int]]
    """Number and process id of the one that is waited for."""
    begun: float = field(default_factory=time.monotonic)
    hurried: float | None = None
    """When `late` first found it while the run was asked to stop."""


@contextlib.contextmanager
def waiting(wait: Wait) -> Iterator[None]:
    """Within this context, `late` knows of it."""
    thread = threading.get_ident()
    outer = _waits.get(thread)
    _waits[thread] = wait
    try:
        yield
    finally:
        if outer is None:
            del _waits[thread]
        else:
            _waits[thread] = outer


def forgive(seconds: float) -> None:
    """Leave out of every wait the seconds in which this process was stopped itself, perhaps its readers with it."""
    now = time.monotonic()
    for wait in list(_waits.values()):
        wait.begun = min(wait.begun + seconds, now)
        if wait.hurried is not None:
            wait.hurried = min(wait.hurried + seconds, now)


def late(now: float | None = None) -> str | None:
    """What is said of the first reader that is waited for too long; None where there is none. For another thread.

    `now`: until when seconds were left out by `forgive`, if they are.
    """
    now, is_stopping = time.monotonic() if now is None else now, is_hurried()
    for wait in list(_waits.values()):
        if is_stopping and wait.hurried is None:
            wait.hurried = now
        is_late = now - wait.begun >= wait.seconds
        if is_late or (wait.hurried is not None and now - wait.hurried >= WHEN_STOPPING):
            asked = ", though the run was asked to stop" if is_stopping else ""
            return (
                f"{wait.dataset}: {wait.what} came from {_name(wait)} for {now - wait.begun:.0f} seconds{asked}; look "
                f"at that process and at the file system, and start the same command again: it goes on from the save "
                f"before"
            )
    return None


def _name(wait: Wait) -> str:
    try:
        number, pid = wait.reader()
    except Exception:  # it is being closed by the thread that waits
        return "a reading process"
    return f"reading process {number} (pid {pid}, {in_words(pid)}, in {_shards(pid)})"


class Answers:
    """What one reader says of its place in the data: its queue, of which `late` knows."""

    def __init__(self, answers: Any, loader: Any, dataset: Path, number: int, seconds: float) -> None:
        # No cycle, which would leave the loader, and its readers, to the garbage collector.
        self._answers, self._loader = answers, weakref.ref(loader)
        self._dataset, self._number, self._seconds = dataset, number, seconds

    def get(self) -> Any:
        """The next one."""
        loader: Any = self._loader()
        number = self._number
        reader = lambda: (number, loader.workers[number].pid)  # noqa: E731
        with waiting(Wait(self._dataset, "no answer", self._seconds, reader)):
            return self._answers.get()


def was_killed(process: BaseProcess) -> int | None:
    """The number of the signal that ended it, if one did. That is noticed in several ways, some while it still ends."""
    with contextlib.suppress(RuntimeError):  # torch's, out of the signal that the process ended
        process.join(0.2)
    code = process.exitcode or 0
    return -code if code < 0 else None


def of_killed(dataset: Path, number: int) -> str:
    """What is said of a reader that this signal ended."""
    try:
        name = signal.Signals(number).name
    except ValueError:  # Python names few of the real-time ones
        name = f"signal {number}"
    if number == signal.SIGBUS:
        return f"{dataset}: a process that reads was killed by {name}; {MORE_ROOM}"
    return (
        f"{dataset}: a process that reads was killed by {name}; if memory ran out, use fewer --num-workers, else "
        f"start the same command again"
    )


def check_room(size: int, count: int) -> None:
    """Say so where `count` ranks of this machine, that read `size` bytes ahead each, may fill shared memory.

    It is no error: samples may have no images.
    """
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return
    free = status.f_bavail * status.f_frsize
    if count * size > free:
        logger.warning(
            f"reading ahead may take {count * size / 2**20:.1f} MB of shared memory ({SHARED_MEMORY}), which has "
            f"{free / 2**20:.1f} MB free: give it more (docker's --shm-size), or use a smaller --micro-batch-size or "
            f"fewer --num-workers"
        )


def _shards(pid: int) -> str:
    """The tar files that a process has open."""
    names = set()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                names.add(os.readlink(link))
    return ", ".join(sorted(Path(name).name for name in names if name.endswith(".tar"))[:3]) or "no shard"
