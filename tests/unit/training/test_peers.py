"""Who counts as failed, and who does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megatron_patch.files import STORE
from megatron_patch.training.peers import _dead, _Store


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
    second.write(7, "the disk is full")
    first.write(0, "lost the others")
    assert first.read() == second.read() == (7, "the disk is full")


def test_so_it_is_on_one_machine_where_ranks_meet_in_files(monkeypatch, tmp_path):
    monkeypatch.setenv(STORE, f"file://{tmp_path}/ranks")
    test_the_first_rank_that_fails_is_read_by_all(None)


def test_a_store_that_is_gone_says_nothing(host):
    store = _Store()
    host.clear()
    assert store.read() is None
    store.write(0, "the disk is full")
    assert store.read() is None


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
    assert _dead(marks) == [marks.index(killed)]
