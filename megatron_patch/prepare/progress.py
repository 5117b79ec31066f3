"""How far a conversion is, on stderr."""

from __future__ import annotations

import contextlib
import sys
import time


class Progress:
    """Count, rate and time left: a line every 10 seconds, on a terminal one that is renewed each second."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._start = self._last = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def add(self, samples: int) -> None:
        """So many more are done."""
        self._done += samples
        now = time.monotonic()
        if now - self._last >= (1 if self._is_terminal else 10):
            self._last = now
            self._print(now - self._start)

    def close(self) -> None:
        """Leave the terminal's line."""
        if self._is_terminal and self._last != self._start:
            print(file=sys.stderr)

    def _print(self, seconds: float) -> None:
        from tqdm import tqdm

        layout = "{n_fmt}/{total_fmt} samples, {rate_noinv_fmt}, {remaining} left"
        line = tqdm.format_meter(self._done, self._total, seconds, bar_format=layout)
        begin, end = ("\r", "") if self._is_terminal else ("", "\n")
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"{begin}{line}", end=end, file=sys.stderr, flush=True)
