"""How a run ends before its last iteration: by a signal, by the time allowed, with its parent; and that it is alone."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from megatron_patch.files import marks
from megatron_patch.model import groups
from megatron_patch.training.launch import SIGNALS
from megatron_patch.training.log import logger


class Stop:
    """Notes signals until the step that they came in is through, and watches the clock."""

    def __init__(self, minutes: float | None) -> None:
        self.signal: signal.Signals | None = None
        """The signal for which all ranks stop."""
        self.reason = ""
        """What stops all ranks, in words."""
        self.minutes = minutes
        self._noted = 0  # by the handler alone: it may run at any moment, in `due` too
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        for number in SIGNALS:
            # nohup has SIGHUP ignored to outlive a terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
        # torchrun hands the signal to the processes that read data too, without which the place in the data cannot be
        # saved. They end with the trainer instead.
        os.register_at_fork(after_in_child=_ignore_signals)

    def due(self) -> bool:
        """Whether all ranks stop now: after a signal to any of them, or when the time is up. Every rank must ask."""
        late = self.end is not None and time.monotonic() >= self.end
        reason = torch.tensor([self._noted, late], dtype=torch.int32, device=groups.device())
        dist.all_reduce(reason, op=dist.ReduceOp.MAX)
        number, late = reason.tolist()
        if number:
            self.signal = signal.Signals(number)
            self.reason = self.signal.name
        elif late:
            self.reason = f"--exit-duration-in-mins {self.minutes}"
        return bool(number or late)

    def is_asked(self) -> bool:
        """Whether a signal came to this rank."""
        return self._noted != 0

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that a signal ended: 143 for SIGTERM, 130 for SIGINT, ...; else 0."""
        return 128 + self.signal if self.signal else 0

    def _note(self, number: int, frame: object) -> None:
        self._noted = number


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, killed or not (Linux's prctl(2))."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def lock(folder: Path) -> IO[bytes]:
    """Hold `folder` until the returned file is closed. Raises ValueError when another run holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "wb", buffering=0)
    except OSError as error:
        raise ValueError(f"{path}: cannot be made or locked ({error.strerror}); move what is there away") from None
    try:
        if not marks.lock(file.fileno()):
            logger.warning(f"{folder}: no locks on this file system; see that no other run writes it")
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder}: another run is writing it; wait for its end, or give another output") from None
    return file


def _ignore_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    end_with_parent()
