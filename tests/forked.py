"""Processes that start at once: forked from one that has loaded `tests.loaded`.

megatron.core itself is not loaded there, whose repairs are made on import.
"""

from __future__ import annotations

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
# Of a test process there is one such server, so that this is the one list of what it loads.
PROCESSES.set_forkserver_preload(["tests.loaded"])
