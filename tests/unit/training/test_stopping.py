"""What ends a run early, and that a folder is one run's."""

from __future__ import annotations

import logging
import os
import signal

import pytest

from megatron_patch.files import marks
from megatron_patch.training import launch, stopping
from megatron_patch.training.stopping import Stop, lock


@pytest.fixture(autouse=True)
def _handlers(monkeypatch):
    """This process' signals as they were afterwards, also in what it forks later."""
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: None)
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("number", stopping.SIGNALS)
@pytest.mark.parametrize("is_ignored", [False, True], ids=["", "of what a shell started with &"])
def test_a_signal_stops_after_the_step(number, is_ignored):
    signal.signal(number, signal.SIG_IGN if is_ignored and number != signal.SIGHUP else signal.SIG_DFL)
    stop = Stop(None)
    assert not stop.due()
    os.kill(os.getpid(), number)
    assert stop.due()
    assert stop.reason == number.name
    assert stop.exit_code == 128 + number


@pytest.mark.usefixtures("one_process")
def test_nohup_is_obeyed():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop(None)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.due()
    assert launch._signals() == "SIGTERM,SIGINT,SIGUSR1,SIGQUIT"


def test_the_launcher_hands_on_what_ranks_save_after():
    assert launch.SIGNALS == stopping.SIGNALS
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert launch._signals() == "SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGQUIT"


def test_a_folder_is_one_runs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("megatron_patch"), "propagate", True)
    with lock(tmp_path / "run"), pytest.raises(ValueError, match="another run is writing it"):
        lock(tmp_path / "run")
    lock(tmp_path / "run").close()
    monkeypatch.setattr(marks, "lock", lambda descriptor: False)  # a mock of a file system without locks
    lock(tmp_path / "run").close()
    assert "run: no locks on this file system" in caplog.text


def test_the_lock_follows_no_link_and_empties_no_file(tmp_path):
    (tmp_path / "thesis").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(ValueError, match=r"\.lock: cannot be made or locked"):
        lock(tmp_path)
    assert (tmp_path / "thesis").read_text() == "precious"
    (tmp_path / "other" / ".lock").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"\.lock: cannot be made or locked"):
        lock(tmp_path / "other")
