"""Reasons to stop before the last iteration: a signal from the scheduler or the terminal, or the time allowed."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from megatron_patch import parallel

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Notes signals until the step that they came in is through, and watches the clock."""

    def __init__(self, minutes: float | None) -> None:
        self.signal: signal.Signals | None = None
        """The signal for which all ranks stop."""
        self._noted = 0  # by the handler alone: it may run at any moment, in `due` too
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        for number in SIGNALS:
            signal.signal(number, self._note)
        # torchrun hands the signal to the processes that read data too, without which the place in the data cannot be
        # saved. They end with the trainer.
        os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))

    def due(self) -> bool:
        """Whether all ranks stop now: after a signal to any of them, or when the time is up. Every rank must ask."""
        late = self.end is not None and time.monotonic() >= self.end
        reason = torch.tensor([self._noted, late], dtype=torch.int32, device=parallel.device())
        dist.all_reduce(reason, op=dist.ReduceOp.MAX)
        number, late = reason.tolist()
        self.signal = signal.Signals(number) if number else None
        return bool(number or late)

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that a signal ended: 143 for SIGTERM, 130 for SIGINT; else 0."""
        return 128 + self.signal if self.signal else 0

    def _note(self, number: int, frame: object) -> None:
        self._noted = number
