"""How a command begins and ends: `| head` ends a pipe, and no work; Ctrl-C ends it without a traceback."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO


def run(command: Callable[[], int]) -> NoReturn:
    """End this process with what `command` returns."""
    outlive_readers()
    try:
        sys.exit(command())
    except KeyboardInterrupt:  # before it could say what it leaves
        sys.exit(130)


@contextmanager
def loading() -> Iterator[None]:
    """Import large libraries within it, with Python's garbage collector off; what they define is frozen.

    torch, megatron.core and transformers define a million objects, none of which is garbage. The collector would walk
    through all of them again and again while they are loaded, which is a quarter of the processor time, and now and
    then in the middle of a step.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def outlive_readers() -> None:
    """Have this process go on, in silence, when whoever reads its output or its errors is gone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:
            setattr(sys, name, Outliving(stream))


class Outliving:
    """A stream that drops what nobody reads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
