"""A forked process that does not come up is replaced, on the Pythons where that happens. Imports nothing heavy.

CPython before 3.10.15 and 3.11.10 (its issue 112275): a process forked while another thread, in C and without the GIL,
makes or ends a thread state waits for ever for a lock of which nobody is left to let go, before its first line of
Python. Communication does that for microseconds after each collective. From 3.12 on there is nothing to repair.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading

logger = logging.getLogger("megatron_patch")

PATIENCE = 5.0
"""Seconds that the first process is given to come up. Each one after it gets twice as many."""
TRIES = 5
"""Processes of which one has to come up."""

_fork = getattr(os, "fork", None)
_one_at_a_time = threading.RLock()  # so that no process inherits what another's fork waits on; a signal may fork too


def needed(version: tuple[int, ...] = sys.version_info[:3], implementation: str = sys.implementation.name) -> bool:
    """Whether a process forked by this Python may never come up."""
    mended = version >= (3, 12) or (3, 11) > version >= (3, 10, 15) or version >= (3, 11, 10)
    return _fork is not None and implementation == "cpython" and not mended


MENDED = "3.10.15, 3.11.10, 3.12 and newer"
"""The Pythons that need no repair."""


def install() -> None:
    """Put `fork` in the place of `os.fork`, through which multiprocessing forks too, where that is `needed`."""
    if needed() and os.fork is not fork:
        os.register_at_fork(after_in_child=_unlock)
        os.fork = fork


def fork() -> int:
    """`os.fork` whose new process begins only when this one knows that it came up, and is replaced when it does not.

    The new process says that it is there, and waits for leave to begin: what is killed for being late, even if it is
    slow and not stuck, has done nothing. Raises OSError where none comes up, and no descriptor stays open in either.
    """
    with _one_at_a_time:
        for attempt in range(TRIES):
            patience = PATIENCE * 2**attempt
            pid = _fork_and_wait(patience)
            if pid is not None:
                return pid
            again = "it has done nothing yet, and is forked again" if attempt + 1 < TRIES else "it has done nothing"
            logger.warning(f"a forked process did not come up in {patience:g} seconds; {again}")
    raise OSError(f"none of {TRIES} forked processes came up; start the same command again")


def _fork_and_wait(patience: float) -> int | None:
    """What `os.fork` gives, in both processes; None where the new one did not come up, which is gone then."""
    here, there = socket.socketpair()
    with here, there:
        assert _fork is not None, "not `needed`"
        pid = _fork()
        if pid == 0:
            _ask(here, there)
            return 0
        try:
            there.close()
            came_up = _is_asked(here, patience)
            if came_up:
                with contextlib.suppress(OSError):  # it ended
                    here.send(b"!")
                return pid
        except BaseException:  # out of a signal's handler
            _end(pid)
            raise
        _end(pid)
        return None


def _ask(here: socket.socket, there: socket.socket) -> None:
    """In the new process: return with leave to begin; else end."""
    with contextlib.suppress(BaseException):  # what comes after is the caller's of the process that forked
        here.close()
        there.sendall(b"?")
        if there.recv(1):
            return
    os._exit(1)


def _is_asked(here: socket.socket, patience: float) -> bool:
    """Whether the new process came up, or ended before it did, which is its parent's to see."""
    for seconds in (patience, 0.0):  # once more without waiting: this process may have been stopped meanwhile
        here.settimeout(seconds)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            here.recv(1)
            return True
    return False


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):  # where something waits for all children
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _unlock() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.RLock()
