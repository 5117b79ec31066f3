"""Processes that start at once: forked from one that has loaded `tests.loaded`.

megatron.core itself is not loaded there, whose repairs are made on import.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
# Of a test process there is one such server, so that this is the one list of what it loads.
PROCESSES.set_forkserver_preload(["tests.loaded"])


def in_server(function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
    """`function(*arguments)`, called in the one process that has imported whatever was called in it before.

    What is called there does nothing but import and fork: ranks that need megatron.core find it loaded.
    """
    return _server().submit(function, *arguments).result(seconds)


@functools.cache
def _server() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, PROCESSES)
