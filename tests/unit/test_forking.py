"""A forked process that does not come up is replaced, and nothing is done twice."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest

from megatron_patch import forking


@pytest.fixture(autouse=True)
def said(monkeypatch) -> list[str]:
    """What was logged."""
    lines: list[str] = []
    monkeypatch.setattr(forking, "PATIENCE", 0.3)
    monkeypatch.setattr(forking.logger, "warning", lines.append)
    return lines


def forks_of(monkeypatch, *starts: Callable[[], None]) -> list[int]:
    """Have each fork's new process begin with one of these, further ones with none. The processes, as they are made."""
    made: list[int] = []

    def fork() -> int:
        start = starts[len(made)] if len(made) < len(starts) else lambda: None
        pid = REAL()
        if pid == 0:
            start()
        made.append(pid)
        return pid

    monkeypatch.setattr(forking, "_fork", fork)
    return made


REAL = forking._fork


def never() -> None:
    time.sleep(600)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_gone(pid: int) -> bool:
    try:
        return bool(os.waitpid(pid, os.WNOHANG)) and False
    except ChildProcessError:
        return True


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def in_a_process(action: Callable[[], bool]) -> bool:
    """What it gives in a process of its own."""
    pid = REAL()
    if pid == 0:
        os._exit(0 if action() else 1)
    return exit_code(pid) == 0


@pytest.mark.parametrize(
    ("version", "implementation", "expected"),
    [
        ((3, 10, 0), "cpython", True),
        ((3, 10, 14), "cpython", True),
        ((3, 10, 15), "cpython", False),
        ((3, 11, 0), "cpython", True),
        ((3, 11, 9), "cpython", True),
        ((3, 11, 10), "cpython", False),
        ((3, 12, 0), "cpython", False),
        ((3, 14, 0), "cpython", False),
        ((3, 11, 0), "pypy", False),
    ],
)
def test_which_pythons_need_it(version, implementation, expected):
    assert forking.needed(version, implementation) is expected


def test_it_is_installed_where_it_is_needed():
    assert (os.fork is forking.fork) == forking.needed()


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or not forking.needed(), reason="the lock lies elsewhere, or is mended"
)
def test_the_fault_itself(monkeypatch):
    """CPython's lock is held, by a thread that a forked process does not have, until the second process is forked."""
    api = ctypes.pythonapi
    words = (ctypes.c_void_p * 8).from_address(ctypes.addressof(ctypes.c_char.in_dll(api, "_PyRuntime")))
    api.PyInterpreterState_Main.restype = ctypes.c_void_p
    assert words[5] == words[6] == api.PyInterpreterState_Main()  # so that the one before them is the lock
    lock = ctypes.c_void_p(words[4])
    monkeypatch.setattr(forking.logger, "warning", lambda line: api.PyThread_release_lock(lock))
    api.PyThread_acquire_lock(lock, 1)
    pid = forking.fork()
    if pid == 0:
        os._exit(7)
    assert exit_code(pid) == 7


def test_one_that_does_not_come_up_is_replaced(monkeypatch, said):
    made, before = forks_of(monkeypatch, never, never), open_files()
    pid = forking.fork()
    if pid == 0:
        os._exit(7)
    assert exit_code(pid) == 7
    assert pid == made[2]
    assert is_gone(made[0])
    assert is_gone(made[1])
    assert open_files() == before
    assert [line.split(" come up in ")[1] for line in said] == [
        "0.3 seconds; it has done nothing yet, and is forked again",
        "0.6 seconds; it has done nothing yet, and is forked again",
    ]


def test_one_that_comes_up_late_does_nothing(monkeypatch, said):
    """It is let loose after it was given up, before it is killed."""
    made = forks_of(monkeypatch, lambda: signal.sigwait({signal.SIGUSR1}))
    end = forking._end

    def end_late(pid: int) -> None:
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3)
        end(pid)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    monkeypatch.setattr(forking, "_end", end_late)
    reader, writer = os.pipe()
    pid = forking.fork()
    if pid == 0:
        os.write(writer, b"x")
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    assert exit_code(pid) == 0
    assert len(made) == 2
    assert len(said) == 1
    os.close(writer)
    assert os.read(reader, 10) == b"x"
    os.close(reader)


def test_none_that_comes_up_is_an_error_of_the_system(monkeypatch, said):
    monkeypatch.setattr(forking, "PATIENCE", 0.01)
    made = forks_of(monkeypatch, *[never] * forking.TRIES)
    with pytest.raises(OSError, match="none of 5 forked processes came up"):
        forking.fork()
    assert all(map(is_gone, made))
    assert len(made) == len(said) == forking.TRIES


def test_one_that_is_killed_before_it_comes_up_is_its_parents_to_see(monkeypatch, said):
    forks_of(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert exit_code(forking.fork()) == -signal.SIGKILL
    assert not said


def test_a_parent_that_was_stopped_meanwhile_does_not_take_it_for_late(monkeypatch, said):
    def stop_the_parent() -> None:
        os.kill(os.getppid(), signal.SIGSTOP)
        if REAL() == 0:
            time.sleep(0.8)
            os.kill(parent, signal.SIGCONT)
            os._exit(0)

    def action() -> bool:
        nonlocal parent
        parent = os.getpid()
        made = forks_of(monkeypatch, stop_the_parent)
        pid = forking.fork()
        if pid == 0:
            os._exit(7)
        return exit_code(pid) == 7 and len(made) == 1 and not said

    parent = 0
    assert in_a_process(action)


def test_a_handler_that_raises_leaves_no_process(monkeypatch):
    def interrupt_the_parent() -> None:
        time.sleep(0.1)  # until it knows what it has forked
        os.kill(os.getppid(), signal.SIGUSR1)
        never()

    def action() -> bool:
        def handler(number, frame):
            raise KeyboardInterrupt

        signal.signal(signal.SIGUSR1, handler)
        monkeypatch.setattr(forking, "PATIENCE", 60)
        made = forks_of(monkeypatch, interrupt_the_parent)
        try:
            forking.fork()
        except KeyboardInterrupt:
            return is_gone(made[0])
        return False

    assert in_a_process(action)


def test_one_whose_parent_is_killed_ends_too(monkeypatch):
    """It comes up only then."""
    reader, writer = os.pipe()

    def late() -> None:
        os.write(writer, f"{os.getpid()}\n".encode())
        while os.getppid() == parent:
            time.sleep(0.01)

    parent = REAL()
    if parent == 0:
        parent = os.getpid()
        monkeypatch.setattr(forking, "PATIENCE", 60)
        forks_of(monkeypatch, late)
        forking.fork()
        os.write(writer, b"it began\n")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        lines.readline()
        os.kill(parent, signal.SIGKILL)
        assert exit_code(parent) == -signal.SIGKILL
        assert lines.read() == ""  # until nobody holds the other end


def test_threads_that_fork_at_once_hand_on_no_descriptor_of_each_other():
    before, codes = set(open_files()), []

    def fork_one() -> None:
        pid = forking.fork()
        if pid == 0:
            files = {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
            sockets = [name for name in files - before if os.readlink(f"/proc/self/fd/{name}").startswith("socket")]
            os._exit(len(sockets))
        codes.append(exit_code(pid))

    threads = [threading.Thread(target=fork_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0, 0, 0]
    assert set(open_files()) == before


@pytest.mark.skipif(not forking.needed(), reason="nothing is installed")
def test_multiprocessing_forks_through_it_in_a_forked_process_too(monkeypatch, said):
    made = forks_of(monkeypatch, never)

    def nested() -> None:
        forks_of(monkeypatch, never)
        inner = context.Process(target=sys.exit, args=(5,))
        inner.start()
        inner.join()
        sys.exit(inner.exitcode + len(said))  # its own line and the outer one's

    context = multiprocessing.get_context("fork")
    process = context.Process(target=nested)
    process.start()
    process.join()
    assert process.exitcode == 5 + 2
    assert process.pid == made[1]


@pytest.mark.skipif(not forking.needed(), reason="nothing is installed")
def test_a_process_forked_by_others_while_one_is_waited_for_can_fork(monkeypatch):
    made = forks_of(monkeypatch, never)
    thread = threading.Thread(target=lambda: os.waitpid(pid, 0) if (pid := forking.fork()) else os._exit(0))
    thread.start()
    while not made:
        time.sleep(0.01)
    other = REAL()
    if other == 0:
        signal.alarm(10)  # it would wait for a thread that it has not
        pid = forking.fork()
        os._exit(0 if pid == 0 else exit_code(pid))
    assert exit_code(other) == 0
    thread.join()
