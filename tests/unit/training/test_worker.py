"""What a rank that an error ends tells the launcher."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch
from torch.distributed import DistBackendError, DistStoreError, FileStore, ProcessGroupGloo

from megatron_patch.files.names import STORE
from megatron_patch.model import groups
from megatron_patch.training import peers, stopping, worker
from megatron_patch.training.worker import _line

CONFIG = SimpleNamespace(
    checkpoint=SimpleNamespace(output=Path("run")), training=SimpleNamespace(distributed_timeout_minutes=10)
)
LATE = "waited 10 minutes (--distributed-timeout-minutes) for another rank, which hangs, is slower than that, or was "


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DistBackendError("NCCL error: remote process exited"), None),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), None),
        (OSError("/data/gloomy/a.tar: no such file"), "/data/gloomy/a.tar: no such file"),
        (ValueError("gloo"), "gloo"),
        (RuntimeError("out\n of memory"), "RuntimeError: out of memory; its traceback is in the rank's log"),
        (RuntimeError("DataLoader timed out"), "RuntimeError: DataLoader timed out; its"),
        (DistBackendError("NCCL: wait timeout"), LATE),
        (DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 clients joined."), LATE),
        (RuntimeError("Application timeout caused pair closure"), LATE),
    ],
    ids=str,
)
def test_who_only_lost_the_others_is_silent(error, line):
    said = _line(error, CONFIG)
    assert said is None if line is None else said.startswith(line)


def test_the_time_that_is_given_reaches_whoever_waits(tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", STORE: "file://store"}.items():
        monkeypatch.setenv(name, value)
    told, started = [], Mock(side_effect=ValueError("far enough"))
    monkeypatch.setattr(worker, "start_log", lambda folder, rank: None)
    monkeypatch.setattr(worker, "_tell_launcher", told.append)
    monkeypatch.setattr(stopping, "end_with_parent", lambda: None)
    monkeypatch.setattr(groups, "start", started)
    monkeypatch.setattr(peers, "watch", told.append)
    monkeypatch.setattr(peers, "tell", told.append)
    given = MagicMock(training=SimpleNamespace(distributed_timeout_minutes=7, seed=3))
    assert worker.run(given) == 1
    assert told == [7, "far enough", "far enough"]
    started.assert_called_once_with(given.parallel, 3, 7, init_method="file://store", rank=1, world_size=2)


def test_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "log").write_text("in the way")
    told = []
    monkeypatch.setattr(worker, "_tell_launcher", told.append)
    assert worker.run(SimpleNamespace(checkpoint=SimpleNamespace(output=tmp_path))) == 1
    assert told == [f"{tmp_path}/log: cannot be written (File exists); move what is there away"]


def test_who_waited_too_long_for_the_others_says_so(tmp_path):
    """gloo's own error, and that of the place where its ranks meet."""
    made = {}

    def join(rank: int) -> None:
        made[rank] = ProcessGroupGloo(FileStore(f"{tmp_path}/store", 2), rank, 2, timedelta(seconds=0.1))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = FileStore(f"{tmp_path}/other", 2)
    store.set_timeout(timedelta(seconds=0.1))
    for wait in (lambda: made[0].recv([torch.zeros(1)], 1, 0).wait(), lambda: store.get("never")):
        with pytest.raises(RuntimeError) as raised:
            wait()
        said = _line(raised.value, CONFIG)
        assert said.startswith(LATE)
        assert "other ranks' logs in run/log" in said
