"""What the kernel says of other processes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time

import pytest

from megatron_patch.data import processes


@pytest.mark.parametrize("name", ["训练模型脚本".encode()[:14], b"a) Z (b", b"python"])
def test_states_of_a_process_of_any_name(name):
    """The kernel cuts names after 15 bytes."""

    def run() -> None:
        PR_SET_NAME = 15
        ctypes.CDLL(None).prctl(PR_SET_NAME, name)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        os.waitpid(process.pid, os.WUNTRACED)
        assert processes.is_stopped(process.pid)
        assert processes.in_words(process.pid) == "stopped"
        os.kill(process.pid, signal.SIGCONT)
        assert not processes.is_stopped(process.pid)
        assert processes.in_words(process.pid) == "alive"
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert processes.in_words(process.pid) == "ended"
        process.join()
        assert processes.in_words(process.pid) == "gone"
    finally:
        process.kill()
