"""How a rank learns that another has failed, and ends with it.

A collective that a peer never joins waits in C: NCCL's for the minutes of its watchdog, and no Python signal handler
runs meanwhile. So a thread of each rank looks for a failure once a second, and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, FileStore, Store, TCPStore
from torch.distributed.elastic.multiprocessing.errors.handlers import get_error_handler

from megatron_patch.data import readers
from megatron_patch.files import STORE, TRAINING

INTERVAL = 1.0
"""Seconds between two looks."""
GRACE = 3.0
"""Seconds in which a rank may end by itself after another failed: it may have its own error to tell."""
KEY = f"megatron_patch/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
"""In the store, of this start of the ranks: the rank that failed first, a space, and why."""


def watch() -> None:
    """Start the thread that ends this process, with exit code 1, after another rank has failed.

    It ends whatever waits in C without Python's global lock, as collectives do. A forked process has no such thread,
    nor any lock that it held: it logs nothing, imports nothing and has a connection of its own.
    """
    threading.Thread(target=_watch, name="peers", daemon=True).start()


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
        if kind == "file":
            self.store = FileStore(f"{path}.failed")  # not the ranks' own, which has a great many keys
            return
        with contextlib.suppress(DistError):
            self.store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(minutes=1),
            )

    def read(self) -> tuple[int, str] | None:
        """The rank that failed first, and why."""
        if self.store is None:
            return None
        try:
            if not self.store.check([KEY]):
                return None
            rank, _, line = self.store.get(KEY).decode().partition(" ")
            return int(rank), line
        except DistError:
            # Its host is gone, as when a run has ended well. This rank may still have something to do.
            self.store = None
            return None

    def write(self, rank: int, line: str) -> None:
        """Say which rank failed, if none was said to."""
        if self.store is not None:
            try:
                self.store.compare_set(KEY, "", f"{rank} {line}")
            except DistError:
                self.store = None


def _watch() -> None:
    store, own = _Store(), int(os.environ["RANK"])
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    first = own - own % local_size  # of this node
    folder = mark_path().parents[1]
    marks = [folder / str(local_rank) / TRAINING for local_rank in range(local_size)]
    while True:
        time.sleep(INTERVAL)
        failed = store.read()
        late = readers.late()
        if failed is None and late is not None:
            # The thread that waits for it cannot say so.
            store.write(own, late)
            _end(late, told=False)
        for local_rank in [] if failed else _dead(marks):
            failed = first + local_rank, "it was killed or crashed; see its log"
            store.write(*failed)
        if failed is not None:
            rank, line = failed
            time.sleep(GRACE)
            _end(f"ended by rank {rank}: {line}", told=first <= rank < first + local_size)


def _dead(marks: list[Path]) -> list[int]:
    """Which of the node's ranks ended before their training did, without a word or with an error."""
    dead = []
    for local_rank, mark in enumerate(marks):
        try:
            os.kill(int(mark.read_bytes()), 0)
        except (OSError, ValueError) as error:
            # No mark: not yet training, or through, perhaps since it was read.
            if isinstance(error, ProcessLookupError) and mark.exists():
                dead.append(local_rank)
    return dead


def _end(line: str, told: bool) -> None:
    """End this process with a line in its log, and for the launcher if it was not `told` on this node."""
    try:
        # Not by the logger, whose lock may be held by what waits.
        os.write(2, f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {line}\n".encode())
        if not told:
            get_error_handler().record_exception(RuntimeError(line))
    finally:
        os._exit(1)
