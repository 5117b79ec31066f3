"""Processes that share shards end with their run."""

import os
import signal
import time

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
