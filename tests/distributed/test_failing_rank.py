"""One rank fails while another waits in C: the run ends within seconds, and says once what ended it."""

from __future__ import annotations

import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.distributed import failing
from tests.forked import PROCESSES

SECONDS = 15
"""From the first end to the last. torchrun kills the ranks of its own node 30 s after one failed, others' never."""


def start(output: Path, *ends: str, nodes: int = 1) -> list[BaseProcess]:
    """The launchers, one per node; each writes its errors into a file."""
    output.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launchers = [
        PROCESSES.Process(
            target=failing.launch,
            args=(output / f"errors_{node}", [str(output), str(nodes), str(node), str(port), *ends]),
        )
        for node in range(nodes)
    ]
    for launcher in launchers:
        launcher.start()
    return launchers


def said(launchers: list[BaseProcess], output: Path) -> list[str]:
    """What each launcher says of a run that failed, soon after it did."""
    for launcher in launchers:
        launcher.join(120)
    codes = [launcher.exitcode for launcher in launchers]
    for launcher in launchers:
        launcher.kill()
    assert time.time() - (output / "failed").stat().st_mtime < SECONDS
    assert codes == [1] * len(launchers)
    return [(output / f"errors_{node}").read_text() for node in range(len(launchers))]


def log(output: Path, rank: int) -> str:
    return (output / "log" / f"rank_{rank:03d}.log").read_text()


def test_two_ranks_that_raise_and_one_that_waits(tmp_path):
    (text,) = said(start(tmp_path, "raises", "raises", "blocked"), tmp_path)
    assert text in ("error: rank 0: the disk is full\n", "error: rank 1: the disk is full\n")
    assert log(tmp_path, 2).splitlines()[-1].endswith("the disk is full")
    assert " ended by rank " in log(tmp_path, 2)


def test_a_rank_that_is_killed(tmp_path):
    (text,) = said(start(tmp_path, "blocked", "killed"), tmp_path)
    assert text == f"error: rank 1 ended with signal SIGKILL; see {tmp_path}/log\n"
    assert "ended by rank 1: it was killed or crashed; see its log" in log(tmp_path, 0)


def test_a_rank_of_another_node_that_still_starts(tmp_path):
    """The node of the rank that fails has the store, and no other rank to wait for."""
    texts = said(start(tmp_path, "raises in start", "blocked in start", nodes=2), tmp_path)
    assert texts == ["error: rank 0: the disk is full\n", "error: rank 1: ended by rank 0: the disk is full\n"]


def test_a_signalled_rank_has_its_time(tmp_path):
    """The others are through long before it."""
    (launcher,) = start(tmp_path, "saves", "saves")
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready_*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.terminate()
    launcher.join(60)
    assert (tmp_path / "errors_0").read_text() == ""
    assert launcher.exitcode == 143
