"""How far a command is, on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Literal


class Meter:
    """Count, rate and time left: a line every 10 seconds, on a terminal one that is renewed each second."""

    def __init__(self, total: int, unit: Literal["samples", "B"]) -> None:
        """`total`: of samples, or of bytes, which are shown in kB, MB and GB."""
        self._total = total
        self._unit = unit
        self._done = 0
        self._start = self._last = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal's line."""
        if self._is_terminal and self._last != self._start:
            self._print(time.monotonic() - self._start)
            with contextlib.suppress(OSError):
                print(file=sys.stderr)

    def add(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._last >= (1 if self._is_terminal else 10):
            self._last = now
            self._print(now - self._start)

    def _print(self, seconds: float) -> None:
        from tqdm import tqdm

        is_samples = self._unit == "samples"
        layout = "{n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"
        line = tqdm.format_meter(
            self._done,
            self._total,
            seconds,
            unit=" samples" if is_samples else "B",
            unit_scale=not is_samples,
            bar_format=layout,
        )
        begin, end = ("\r", "") if self._is_terminal else ("", "\n")
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"{begin}{line}", end=end, file=sys.stderr, flush=True)
