"""Who counts as failed, and who does not."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megatron_patch.data import processes, readers
from megatron_patch.files.names import STORE, TRAINING
from megatron_patch.training import peers
from megatron_patch.training.peers import _dead, _Stopped, _Store

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def host(monkeypatch) -> list[TCPStore]:
    """The store that torchrun would have, as the only thing in a list: taken out, it is gone."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv(STORE, "env://")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return [store]


def test_the_first_rank_that_fails_is_read_by_all(host):
    first, second = _Store(), _Store()
    assert first.read() is None
    second.write(7, "/\udcff: the disk is full")  # of a file whose name is no UTF-8
    first.write(0, "lost the others")
    assert first.read() == second.read() == (7, "/\\udcff: the disk is full")


def test_so_it_is_on_one_machine_where_ranks_meet_in_files(monkeypatch, tmp_path):
    monkeypatch.setenv(STORE, f"file://{tmp_path}/ranks")
    test_the_first_rank_that_fails_is_read_by_all(None)


def test_a_store_that_is_gone_says_nothing(host):
    store = _Store()
    host.clear()
    assert store.read() is None
    store.write(0, "the disk is full")
    assert store.read() is None


def test_a_store_whose_folder_is_gone_is_not_waited_for(monkeypatch, tmp_path):
    """torch waits 5 minutes for a file that is not there."""
    (tmp_path / "launcher").mkdir()
    monkeypatch.setenv(STORE, f"file://{tmp_path}/launcher/ranks")
    monkeypatch.setattr(peers, "STORE_TIMEOUT", timedelta(seconds=0.1))
    reader, writer = _Store(), _Store()
    shutil.rmtree(tmp_path / "launcher")
    start = time.monotonic()
    assert reader.read() is None
    writer.write(0, "the disk is full")
    assert _Store().read() is None
    assert time.monotonic() - start < 10
    assert timedelta(seconds=10) > peers.STORE_TIMEOUT


def test_only_a_rank_that_ended_while_it_trained_is_dead(tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    marks = [tmp_path / name for name in ("own", "starts", "begins", "through", "killed")]
    own, _, begins, through, killed = marks
    own.write_text(str(os.getpid()))
    begins.touch()
    for mark in (through, killed):
        mark.write_text(str(process.pid))
    read = Path.read_bytes

    def read_and_end(path: Path) -> bytes:
        """A rank that ends well just when it is looked at."""
        content = read(path)
        if path == through:
            path.unlink()
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_end)
    assert list(_dead(marks)) == [marks.index(killed)]


@pytest.fixture
def node(monkeypatch, tmp_path) -> Path:
    """What torchrun has for a node's two ranks, 2 and 3, of which this one is the first."""
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    for name, value in {
        STORE: f"file://{tmp_path}/ranks",
        "RANK": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_ERROR_FILE": f"{tmp_path}/0/error.json",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(peers, "INTERVAL", 0.01)
    monkeypatch.setattr(peers, "GRACE", 0.0)
    monkeypatch.setattr(readers, "_is_stopping", None)
    return tmp_path


@pytest.fixture
def asleep() -> Iterator[subprocess.Popen]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def watched(before: Callable[[], object], minutes: float) -> None:
    """Have a process of its own prepare something and watch, till that ends it as it should."""

    def run() -> None:
        held = before()  # noqa: F841
        peers._watch(minutes)

    process = FORK.Process(target=run)
    process.start()
    process.join(30)
    process.kill()
    process.join()
    assert process.exitcode == 1


def told(node: Path, local_rank: int) -> str:
    return json.loads((node / str(local_rank) / "error.json").read_text())["message"]["message"]


def test_a_rank_whose_reader_is_late_ends_and_says_so_to_all(node, capfd):
    wait = readers.Wait(Path("wds"), "no batch", 0.05, lambda: (3, os.getpid()))
    watched(lambda: readers._waits.update({0: wait}), minutes=10)
    line = told(node, 0)
    assert line.startswith("RuntimeError: wds: no batch came from reading process 3 ")
    assert _Store().read() == (2, line.partition(": ")[2])
    assert capfd.readouterr().err.endswith(f"] {_Store().read()[1]}\n")


def test_a_stopped_rank_is_killed_and_named(node, asleep, capfd):
    (node / "1" / TRAINING).write_text(str(asleep.pid))
    asleep.send_signal(signal.SIGSTOP)
    watched(lambda: None, minutes=0.2 / 60)
    assert asleep.wait(10) == -signal.SIGKILL
    line = told(node, 1)
    assert line.startswith(f"RuntimeError: pid {asleep.pid} was stopped for 0 seconds (by SIGSTOP, ")
    assert _Store().read() == (3, line.partition(": ")[2])
    assert not (node / "0" / "error.json").exists()
    assert " ended by rank 3: pid " in capfd.readouterr().err


def test_a_stopped_process_of_a_rank_is_killed_and_named(node):
    def start() -> object:
        process = FORK.Process(target=time.sleep, args=(600,), name="writer")
        process.start()
        os.kill(process.pid, signal.SIGSTOP)
        (node / "pid").write_text(str(process.pid))
        return process

    watched(start, minutes=0.2 / 60)
    pid = (node / "pid").read_text()
    assert told(node, 0).startswith(f"RuntimeError: writer of this rank, which reads or saves for it, pid {pid} was st")
    assert _Store().read()[0] == 2
    for _ in range(100):
        if not Path("/proc", pid).exists() or processes.state(int(pid)) == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"{pid} lives")


def test_a_rank_that_was_suspended_itself_goes_on(node, asleep):
    """Both are stopped for longer than either may be, with a wait for a reader open; then both go on."""
    (node / "1" / TRAINING).write_text(str(asleep.pid))
    wait = readers.Wait(Path("wds"), "no batch", 1.0, lambda: (3, os.getpid()))
    process = FORK.Process(target=lambda: (readers._waits.update({0: wait}), peers._watch(1 / 48)), daemon=True)
    process.start()
    time.sleep(0.2)
    for number, seconds in ((signal.SIGSTOP, 1.2), (signal.SIGCONT, 0.3)):
        for pid in (process.pid, asleep.pid):
            os.kill(pid, number)
        time.sleep(seconds)
    assert process.is_alive()
    process.join(30)  # of the reader, which is late after all
    assert told(node, 0).startswith("RuntimeError: wds: no batch")


def test_a_look_that_fails_is_said_once_and_the_others_are_taken(node, asleep, monkeypatch, capfd):
    """What fails is a mock."""
    monkeypatch.setattr(_Store, "read", lambda store: int("rank 3"))
    (node / "1" / TRAINING).write_text(str(asleep.pid))
    asleep.send_signal(signal.SIGSTOP)
    watched(lambda: None, minutes=0.2 / 60)
    assert told(node, 1).startswith(f"RuntimeError: pid {asleep.pid} was stopped")
    said = capfd.readouterr().err
    assert said.count("a look at the other processes failed (at_failed: ValueError: invalid literal for int()") == 1
    assert said.count("\n") == 2


def test_the_nodes_ranks_are_known_where_other_nodes_have_more(node, asleep, monkeypatch):
    """As with 3 ranks on the first node, and ranks 3 and 4 here."""
    monkeypatch.setenv("RANK", "3")
    (node / "1" / TRAINING).write_text(str(asleep.pid))
    asleep.kill()
    asleep.wait()
    watched(lambda: None, minutes=10)
    assert _Store().read() == (4, "it was killed or crashed; see its log")
    assert not (node / "0" / "error.json").exists()  # the launcher sees it itself


def test_so_does_one_that_is_suspended_during_a_look(node, monkeypatch):
    """What takes so long is a mock."""
    monkeypatch.setattr(_Store, "read", lambda store: time.sleep(0.3))
    monkeypatch.setattr(peers, "_end", lambda *ends, **how: pytest.fail(str(ends)))
    watch = peers._Watch(10)
    with readers.waiting(readers.Wait(Path("wds"), "no batch", 0.2, lambda: (3, os.getpid()))):
        for _ in range(2):
            watch.look()
    assert not (node / "0" / "error.json").exists()


@pytest.mark.parametrize(
    ("looks", "asked_at", "found"),
    [(479, None, False), (480, None, True), (29, 0, False), (30, 0, True), (129, 100, False), (130, 100, True)],
)
def test_how_long_a_process_may_stand_stopped(monkeypatch, looks, asked_at, found):
    """The process that is stopped is a mock, and so are the seconds."""
    monkeypatch.setattr(processes, "is_stopped", lambda pid: pid == 7)
    stopped, look = _Stopped(480), 0
    readers.hurry_when(lambda: asked_at is not None and look >= asked_at)
    for look in range(looks):  # noqa: B007
        last = stopped.look([6, 7])
    assert (last is not None) == found
    assert last is None or last[0] == 7


def test_a_process_that_went_on_is_counted_from_its_next_stop(monkeypatch):
    """The process is a mock."""
    is_stopped = True
    monkeypatch.setattr(readers, "_is_stopping", None)
    monkeypatch.setattr(processes, "is_stopped", lambda pid: is_stopped)
    stopped = _Stopped(3)
    for is_stopped in (True, True, False, True, True):  # noqa: B007
        assert stopped.look([7]) is None
    assert stopped.look([7]) is not None
