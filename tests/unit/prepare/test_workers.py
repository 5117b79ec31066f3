"""Processes that share shards end with their run."""

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import pytest

from megatron_patch.prepare import workers
from megatron_patch.prepare.workers import run

FORK = multiprocessing.get_context("fork")


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


@pytest.fixture
def started() -> Callable[[], set[multiprocessing.process.BaseProcess]]:
    """A function that gives the processes that the test has started and that are there."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_ends_the_run(signum, started):
    def killed(shard, tell):
        os.kill(os.getpid(), signum)

    with pytest.raises(ValueError, match=r"a process of the conversion was killed \(out of memory\?\)"):
        list(run(killed, range(2), num_workers=2))
    assert not started()


def test_a_process_that_is_killed_before_it_gets_its_next_shard_ends_the_run():
    answers = run(lambda shard, tell: str(os.getpid()), range(9), num_workers=2)
    pid = int(next(answers))
    time.sleep(0.1)  # it has answered for its second shard
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"a process of the conversion was killed \(out of memory\?\)"):
        list(answers)


@pytest.fixture
def quick(monkeypatch):
    """A hundredth of the seconds."""
    monkeypatch.setattr(workers, "INTERVAL", 0.01)


def stopped(pid: int | str, shard: int) -> str:
    return rf"a process of the conversion \(pid {pid}, in shard {shard}\) was stopped for 0 seconds .* the same command"


@pytest.mark.usefixtures("quick")
def test_a_process_that_is_stopped_ends_the_run(started):
    def task(shard, tell):
        tell(0)
        if shard == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return str(shard)

    with pytest.raises(ValueError, match=stopped(r"\d+", 1)):
        list(run(task, range(3), num_workers=2))
    assert not started()


@pytest.mark.usefixtures("quick")
def test_so_does_one_that_is_stopped_while_it_hands_over_a_large_result():
    def task(shard, tell):
        tell(os.getpid() if shard == 0 else 0)
        return bytes(2**21)

    answers = run(task, range(2), num_workers=2)
    pid = next(answer for answer in answers if isinstance(answer, int) and answer)
    time.sleep(0.1)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match=stopped(pid, 0)):
        list(answers)


def test_large_results_are_whole():
    results = {shard: os.urandom(size) for shard, size in enumerate((0, 1, workers.PART, 2**21))}
    found = list(run(lambda shard, tell: (shard, results[shard]), range(4), num_workers=2))
    assert dict(found) == results


@pytest.mark.usefixtures("quick")
def test_a_slow_process_is_named_and_waited_for(capsys, monkeypatch):
    monkeypatch.setattr(workers, "REMARK_AFTER", 5)

    def task(shard, tell):
        time.sleep(0.3 if shard == 0 else 0)
        return str(shard)

    assert sorted(run(task, range(2), num_workers=2)) == ["0", "1"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert all(" (alive) has said nothing of shard 0 for 0 seconds, and is waited for; " in line for line in lines)


@pytest.mark.usefixtures("quick")
def test_a_conversion_that_is_suspended_as_a_whole_goes_on():
    """For longer than a process may stand stopped while the others go on."""

    def convert() -> None:
        os.setpgid(0, 0)
        list(run(lambda shard, tell: time.sleep(0.5), range(2), num_workers=2))

    process = FORK.Process(target=convert)
    process.start()
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(0.6)
    os.killpg(process.pid, signal.SIGCONT)
    process.join(20)
    process.kill()
    assert process.exitcode == 0


def test_processes_whose_parent_is_killed_end_without_a_word(capfd):
    here, there = os.pipe()

    def convert() -> None:
        os.close(here)
        answers = run(lambda shard, tell: [tell(1), tell(1)], range(9), num_workers=2)
        next(answers)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=convert)
    process.start()
    os.close(there)
    assert os.read(here, 1) == b""  # all of them ended
    os.close(here)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert capfd.readouterr().err == ""


class Odd(ValueError):
    """Cannot be read from a pickle."""

    def __init__(self, shard: int, why: str) -> None:
        super().__init__(f"{shard}: {why}")


def with_a_function(error: Exception) -> Exception:
    error.function = lambda: 0
    return error


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "a.jpg"), FileNotFoundError, r"No such file: 'a\.jpg'"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why"), UnicodeDecodeError, "why"),
        (MemoryError(), MemoryError, "^$"),
        (with_a_function(OSError("a store")), ValueError, "^a store$"),
        (Odd(3, "why"), ValueError, "^3: why$"),
        (KeyError("id"), ValueError, "^shard 0: KeyError: 'id'$"),
        (with_a_function(RuntimeError("two\nlines")), ValueError, "^shard 0: RuntimeError: two lines$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_a_task_raises_is_raised_here(error, kind, said, capfd):
    def task(shard, tell):
        raise error

    with pytest.raises(kind, match=said) as raised:
        list(run(task, [0, 0], num_workers=2))
    assert raised.type is kind
    assert capfd.readouterr().err == ""


def test_what_a_task_raises_in_this_process_is_a_line_too():
    with pytest.raises(ValueError, match=r"^shard 7: KeyError: 'id'$"):
        list(run(lambda shard, tell: {}["id"], [7], num_workers=1))


@pytest.mark.parametrize("allowed", [0, 1])
@pytest.mark.parametrize(
    "error",
    [BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), OSError("Resource temporarily unavailable")],
)
def test_no_further_process_is_one_line(allowed, error, monkeypatch, started):
    """A container's limit cannot be had here."""
    fork, left = os.fork, iter([True] * allowed)

    def refused():
        if not next(left, False):
            raise error
        return fork()

    monkeypatch.setattr(os, "fork", refused)
    message = rf"process {allowed + 1} of 3 cannot be started: Resource temporarily unavailable; use fewer --workers"
    with pytest.raises(ValueError, match=message):
        list(run(lambda shard, tell: shard, range(4), num_workers=3))
    assert not started()
