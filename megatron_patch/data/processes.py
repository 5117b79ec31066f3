"""What the kernel says of other processes. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

_WORDS = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk", "Z": "ended", "": "gone"}


def state(pid: int) -> str:
    """The letter of a process's state, as `ps` has it; empty where the process is gone."""
    try:
        # Bytes: the name before it is cut at 15 of them, perhaps inside a character.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1].decode("latin-1")
    except OSError:
        return ""


def is_stopped(pid: int) -> bool:
    """Whether a process stands where SIGSTOP, a debugger or a cluster's suspend stopped it."""
    return state(pid) in ("T", "t")


def in_words(pid: int) -> str:
    """A process's state, for people."""
    return _WORDS.get(state(pid), "alive")
