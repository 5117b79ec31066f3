"""What is said of the processes that read: killed, standing still, without room."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_patch.data import readers
from megatron_patch.data.loader import save_position
from tests.unit.data.loaders import build


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch):
    monkeypatch.setattr(readers, "_is_stopping", None)


def late_while(action, seconds=0.3) -> str:
    """What is said to another thread of a reader, which then goes on, while this one waits for it."""
    said = []

    def look(pid: int) -> None:
        while not said or said[0] is None:
            time.sleep(0.05)
            said[:] = [readers.late()]
        os.kill(pid, signal.SIGCONT)

    loader, wait = action
    (reader,) = loader.workers
    os.kill(reader.pid, signal.SIGSTOP)
    loader._seconds = seconds
    for answers in loader.result_queues:
        answers._seconds = seconds
    thread = threading.Thread(target=look, args=(reader.pid,))
    thread.start()
    wait()
    thread.join()
    assert readers.late() is None  # it came
    return said[0]


def begun(model, dataset):
    loader = build(model, dataset, num_workers=1)
    batches = iter(loader)
    next(batches)
    return loader, batches


def test_a_reader_that_stands_still_is_named_with_its_shard(model, dataset):
    loader, batches = begun(model, dataset)
    where = rf"reading process 0 \(pid {loader.workers[0].pid}, stopped, in .*\.tar\) for 0 seconds; look at"
    said = late_while((loader, lambda: list(islice(batches, 20))))
    assert re.search(rf"wds: no batch came from {where}", said)
    batches.close()


def test_a_reader_that_does_not_say_its_place_is_named(model, dataset):
    loader, batches = begun(model, dataset)
    readers.hurry_when(lambda: True)
    said = late_while((loader, lambda: save_position(loader)))
    where = rf"reading process 0 \(pid {loader.workers[0].pid}, stopped, in .*, though the run was asked to stop; look"
    assert re.search(rf"wds: no answer came from {where}", said)
    batches.close()


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The seconds are a mock."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(readers, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def waiting(begun: float):
    return readers.waiting(readers.Wait(Path("wds"), "no batch", 480, lambda: (3, os.getpid()), begun))


@pytest.mark.parametrize(
    ("asked_at", "last"),
    [(None, 480), (0, 30), (31, 61), (470, 480)],  # a signal cuts short what is still to come, not what has passed
)
def test_how_long_a_reader_is_waited_for(clock, asked_at, last):
    readers.hurry_when(lambda: asked_at is not None and clock.now >= 1000 + asked_at)
    with waiting(clock.now):
        for _ in range(last):
            assert readers.late() is None
            clock.now += 1
        assert f" for {last} seconds" in readers.late()
    assert readers.late() is None


def test_a_batch_that_is_waited_for_after_a_signal_has_its_own_time(clock):
    readers.hurry_when(lambda: True)
    for _ in range(2):
        with waiting(clock.now):
            assert readers.late() is None
            clock.now += 29
            assert readers.late() is None


def test_seconds_in_which_this_process_was_stopped_do_not_count(clock):
    readers.hurry_when(lambda: True)
    with waiting(clock.now):
        assert readers.late() is None
        clock.now += 500
        readers.forgive(499)
        assert readers.late() is None
        clock.now += 29
        assert readers.late() is not None


def test_a_reader_that_is_just_closed_is_late_all_the_same():
    """Its loader may be gone meanwhile."""
    with readers.waiting(readers.Wait(Path("wds"), "no answer", 0, lambda: (0, None.workers[0].pid))):
        assert readers.late().startswith("wds: no answer came from a reading process for 0 seconds; look at")


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", "--shm-size"),
        ("Too many open files (24)", "use fewer --num-workers"),
    ],
)
def test_a_batch_that_cannot_be_handed_over_is_an_error_and_not_waited_for(model, dataset, monkeypatch, reason, advice):
    """torch's allocation, which fails in a reader, is a mock."""

    def share(storage):
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", share)
    with pytest.raises(
        ValueError, match=r"wds: a process that reads could not hand over a batch \(.*" + advice
    ) as said:
        next(iter(build(model, dataset, num_workers=1)))
    assert "\n" not in str(said.value)


def test_a_reader_that_found_shared_memory_full_says_so(model, dataset):
    loader = build(model, dataset, num_workers=1)
    batches = iter(loader)
    next(batches)
    os.kill(loader.workers[0].pid, signal.SIGBUS)
    with pytest.raises(ValueError, match=r"was killed by SIGBUS; shared memory \(/dev/shm\) is full"):
        list(islice(batches, 100))


@pytest.mark.parametrize(("number", "name"), [(40, "signal 40"), (signal.SIGTERM, "SIGTERM")])
def test_any_signal_that_ends_a_reader_is_named(number, name):
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    os.kill(process.pid, number)
    process.join()
    said = readers.of_killed(Path("wds"), readers.was_killed(process))
    assert said.startswith(f"wds: a process that reads was killed by {name}; if memory ran out")


@pytest.mark.parametrize(
    ("options", "pictures"),
    [({"num_workers": 0}, 0), ({"num_workers": 1}, 2 + 1), ({"num_workers": 2, "micro_batch_size": 3}, 4 + 1)],
)
def test_what_is_read_ahead_is_counted(model, dataset, options, pictures):
    loader = build(model, dataset, **options)
    size = options.get("micro_batch_size", 2) * 3 * model[1].vision.img_size ** 2
    assert loader.shared_memory == pictures * size


@pytest.mark.parametrize(("size", "count", "said"), [(100, 1, 0), (101, 1, 1), (50, 3, 1), (0, 8, 0)])
def test_too_little_shared_memory_is_said_before_it_is_filled(monkeypatch, caplog, size, count, said):
    """The machine's is a mock: 100 bytes."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=10))
    with caplog.at_level(logging.WARNING):
        readers.check_room(size, count)
    assert len([line for line in caplog.messages if "shared memory (/dev/shm)" in line]) == said
