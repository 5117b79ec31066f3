"""How a rank learns that another has failed, and ends with it.

A collective that a peer never joins waits in C: NCCL's for the minutes of its watchdog, and no Python signal handler
runs meanwhile. So a thread of each rank looks for a failure once a second, and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

from torch.distributed import FileStore, Store, TCPStore
from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

from megatron_patch.data import processes, readers
from megatron_patch.data.private_api import children
from megatron_patch.files.names import STORE, TRAINING

INTERVAL = 1.0
"""Seconds between two looks."""
GRACE = 3.0
"""Seconds in which a rank may end by itself after another failed: it may have its own error to tell."""
STORE_TIMEOUT = timedelta(seconds=3)
"""For an answer of the store: nothing else is looked at meanwhile."""
KEY = f"megatron_patch/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
"""In the store, of this start of the ranks: the rank that failed first, a space, and why."""


def watch(timeout_minutes: float) -> None:
    """Start the thread that ends this process, with exit code 1, after another rank has failed.

    So it does, a while before the others give up after `timeout_minutes`, for a process on which this one depends and
    that stands still: one that reads and does not answer, or a stopped one, of this node's ranks or forked here.
    It ends whatever waits in C without Python's global lock, as collectives do. A forked process has no such thread,
    nor any lock that it held: it logs nothing, imports nothing and has a connection of its own.
    """
    threading.Thread(target=_watch, args=(timeout_minutes,), name="peers", daemon=True).start()


def tell(line: str) -> None:
    """Tell the other ranks why this one has failed. Takes seconds at most, also when the store's host is gone."""
    failed = int(os.environ["RANK"]), line
    teller = threading.Thread(target=lambda: _Store().write(*failed), daemon=True)
    teller.start()
    teller.join(5)
    if os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"]:
        # The store may end with the last rank of its node: not before the other nodes' ranks have looked.
        time.sleep(2 * INTERVAL)


def mark_path() -> Path:
    """The file that holds this process's id as long as it trains, beside those of the node's other ranks."""
    return Path(os.environ["TORCHELASTIC_ERROR_FILE"]).with_name(TRAINING)


class _Store:
    """A connection of its own to where ranks meet: one is not for two threads. Without a store nothing is read."""

    def __init__(self) -> None:
        self.store: Store | None = None
        kind, _, path = os.environ[STORE].partition("://")
        if kind == "file" and not Path(path).parent.is_dir():
            return  # torch would wait 5 minutes for the launcher's folder to come back, and hold Python's global lock
        with contextlib.suppress(RuntimeError):
            if kind == "file":
                store = FileStore(f"{path}.failed")  # not the ranks' own, which has a great many keys
            else:
                store = TCPStore(
                    os.environ["MASTER_ADDR"],
                    int(os.environ["MASTER_PORT"]),
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(minutes=1),
                )
            store.set_timeout(STORE_TIMEOUT)
            self.store = store

    def read(self) -> tuple[int, str] | None:
        """The rank that failed first, and why."""
        if self.store is None:
            return None
        try:
            if not self.store.check([KEY]):
                return None
            rank, _, line = self.store.get(KEY).decode().partition(" ")
            return int(rank), line
        except RuntimeError:  # torch's, of several kinds
            # Its host is gone, as when a run has ended well. This rank may still have something to do.
            self.store = None
            return None

    def write(self, rank: int, line: str) -> None:
        """Say which rank failed, if none was said to."""
        if self.store is not None:
            try:
                self.store.compare_set(KEY, "", _bytes(f"{rank} {line}").decode())
            except RuntimeError:
                self.store = None


class _Stopped:
    """How long other processes have stood stopped, by SIGSTOP, a debugger or a cluster's suspend.

    That is counted in looks: a job that is suspended as a whole takes none meanwhile, and goes on once continued.
    """

    def __init__(self, seconds: float) -> None:
        """`seconds`: how long one may."""
        self.seconds = seconds
        self._looks: dict[int, int] = {}  # by process id
        self._was_hurried = False

    def look(self, pids: Iterable[int]) -> tuple[int, str] | None:
        """Take a look, `INTERVAL` after the one before: the first that stood too long, and what is said of it."""
        is_hurried = readers.is_hurried()
        if is_hurried and not self._was_hurried:
            self._looks.clear()  # a signal that ends a suspended job finds all of it stopped
        self._was_hurried = is_hurried
        self._looks = {pid: self._looks.get(pid, 0) + 1 for pid in pids if processes.is_stopped(pid)}
        seconds = min(self.seconds, readers.WHEN_STOPPING) if is_hurried else self.seconds
        for pid, looks in self._looks.items():
            if looks * INTERVAL >= seconds:
                asked = ", though the run was asked to stop" if is_hurried else ""
                return pid, (
                    f"pid {pid} was stopped for {looks * INTERVAL:.0f} seconds{asked} (by SIGSTOP, a "
                    f"debugger or a cluster's suspend), and is killed; start the same command again: it goes on from "
                    f"the save before"
                )
        return None


class _Watch:
    """One look after another at what may have failed. Each of them ends this process where something has."""

    def __init__(self, timeout_minutes: float) -> None:
        self.store = _Store()
        self.own = int(os.environ["RANK"])
        self.first = self.own - int(os.environ["LOCAL_RANK"])  # of this node
        self.marks = [_beside(TRAINING, local_rank) for local_rank in range(int(os.environ["LOCAL_WORLD_SIZE"]))]
        self.stopped = _Stopped(60 * timeout_minutes * readers.SHARE_OF_TIMEOUT)
        self.now = time.monotonic()
        self.said: set[str] = set()

    def look(self) -> None:
        """Take all looks. What goes wrong in one is said once, and ends neither the others nor the next."""
        before, self.now = self.now, time.monotonic()
        if self.now - before > 10 * INTERVAL:
            readers.forgive(self.now - before)
        for look in (self.at_failed, self.at_readers, self.at_stopped, self.at_dead):
            try:
                look()
            except Exception as error:
                line = f"{look.__name__}: {type(error).__name__}: {' '.join(str(error).split())}"
                if line not in self.said:
                    self.said.add(line)
                    _say(f"a look at the other processes failed ({line}), and is taken again")

    def at_failed(self) -> None:
        """At what a rank has told."""
        failed = self.store.read()
        if failed is not None:
            self._end_by(*failed)

    def at_readers(self) -> None:
        """At the processes that read for this one. The thread that waits for one cannot say so."""
        line = readers.late(self.now)  # this process may have been stopped since
        if line is not None:
            self.store.write(self.own, line)
            _end(line, told=False)

    def at_stopped(self) -> None:
        """At the processes on which this one depends."""
        ranks = {_marked(mark): local_rank for local_rank, mark in enumerate(self.marks)}
        for pid in (0, os.getpid()):
            ranks.pop(pid, None)
        forked = children()
        found = self.stopped.look([*ranks, *forked])
        if found is None:
            return
        pid, line = found
        if pid in forked:
            line = f"{forked[pid]} of this rank, which reads or saves for it, {line}"
            self.store.write(self.own, line)
            _end(line, told=False, kill=pid)
        # It is told for that rank, of which the launcher may hear first when it is killed.
        rank = self.first + ranks[pid]
        self.store.write(rank, line)
        with contextlib.suppress(OSError):
            _tell_launcher(line, ranks[pid])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _end(f"ended by rank {rank}: {line}", told=True)

    def at_dead(self) -> None:
        """At the node's ranks."""
        for local_rank in _dead(self.marks):
            failed = self.first + local_rank, "it was killed or crashed; see its log"
            self.store.write(*failed)
            self._end_by(*failed)

    def _end_by(self, rank: int, line: str) -> None:
        time.sleep(GRACE)
        _end(f"ended by rank {rank}: {line}", told=self.first <= rank < self.first + len(self.marks))


def _watch(timeout_minutes: float) -> None:
    watch = _Watch(timeout_minutes)
    while True:
        time.sleep(INTERVAL)
        watch.look()


def _marked(mark: Path) -> int:
    """The process id of a rank that trains; 0 where it does not yet, or no more."""
    try:
        return int(mark.read_bytes())
    except (OSError, ValueError):
        return 0


def _dead(marks: list[Path]) -> Iterator[int]:
    """Which of the node's ranks ended before their training did, without a word or with an error."""
    for local_rank, mark in enumerate(marks):
        pid = _marked(mark)
        try:
            os.kill(pid, 0)  # 0 is this process's own group
        except ProcessLookupError:
            if mark.exists():  # else it is through since its mark was read
                yield local_rank
        except PermissionError:
            pass  # it lives


def _beside(name: str, local_rank: int) -> Path:
    """The file of that name in which a rank of this node tells the launcher something."""
    return Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1] / str(local_rank) / name


class _Handler(ErrorHandler):
    """torch's, which writes what the launcher reads, for a given file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _get_error_file_path(self) -> str:
        return str(self.path)


def _tell_launcher(line: str, local_rank: int) -> None:
    """Hand the launcher what ends a rank of this node. Several ranks may do so for one: each replaces a whole file."""
    own = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
    part = own.with_name(f"{own.name}.{local_rank}")
    _Handler(part).record_exception(RuntimeError(line))
    part.replace(_beside(own.name, local_rank))


def _say(line: str) -> None:
    # Not by the logger, whose lock may be held by what waits.
    with contextlib.suppress(OSError):
        os.write(2, _bytes(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {line}\n"))


def _bytes(line: str) -> bytes:
    return line.encode(errors="backslashreplace")  # a file's name may be no UTF-8


def _end(line: str, told: bool, kill: int | None = None) -> None:
    """End this process with a line in its log, and for the launcher if it was not `told` on this node.

    `kill`: a process that ends with it.
    """
    try:
        _say(line)
        if not told:
            _tell_launcher(line, int(os.environ["LOCAL_RANK"]))
        if kill is not None:
            os.kill(kill, signal.SIGKILL)
    finally:
        os._exit(1)
