"""Processes that share shards end with their run."""

import errno
import multiprocessing
import os
import signal
import time

import pytest

from megatron_patch.data.webdataset.workers import run


def test_a_process_that_does_not_answer_sigterm_ends_too():
    """As one that still forks: it has the parent's handler, and may lose what that raises."""

    def stubborn(shard, tell):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tell(1)
        time.sleep(20)
        os._exit(1)

    start = time.monotonic()
    answers = run(stubborn, range(2), num_workers=2)
    assert next(answers) == 1
    answers.close()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_ends_the_run(signum):
    def killed(shard, tell):
        os.kill(os.getpid(), signum)

    with pytest.raises(ValueError, match=r"a process of the conversion was killed \(out of memory\?\)"):
        list(run(killed, range(2), num_workers=2))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("allowed", [0, 1])
def test_no_further_process_is_one_line(allowed, monkeypatch):
    """A container's limit cannot be had here."""
    fork, left = os.fork, iter([True] * allowed)

    def refused():
        if not next(left, False):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", refused)
    message = rf"process {allowed + 1} of 3 cannot be started: Resource temporarily unavailable; use fewer --workers"
    with pytest.raises(ValueError, match=message):
        list(run(lambda shard, tell: shard, range(4), num_workers=3))
    assert not multiprocessing.active_children()
