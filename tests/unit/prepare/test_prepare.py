"""Energon's preparation: what it swallows or waits for is said in one line."""

import errno
import os
import signal
import sqlite3

import pytest
from megatron.energon.flavors.webdataset import prepare as energons
from megatron.energon.flavors.webdataset.itar import TarIndexWriter

from megatron_patch.prepare import prepare
from tests.unit.data.samples import convert_folder, write_pretrain


@pytest.fixture
def folder(tmp_path):
    write_pretrain(tmp_path, 20)
    return tmp_path


def check(folder, match, capsys, kind=(ValueError, OSError)):
    """One line, which names a file; nothing is shown; the same command goes on and leaves nothing else."""
    with pytest.raises(kind, match=match) as caught:
        convert_folder(folder)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capsys.readouterr().err
    assert not (folder / "wds").exists()


def check_goes_on(folder):
    assert convert_folder(folder).written == 20
    names = {path.name for path in (folder / "wds").iterdir()}
    assert names == {f"{index:05d}.tar{end}" for index in range(10) for end in ("", ".idx")} | {
        ".nv-meta",
        "manifest.json",
    }


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_disk_that_is_full_for_a_shards_index(cpus, folder, monkeypatch, capsys, caplog):
    def full(self, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(TarIndexWriter, "append", full)
    check(folder, r"No space left on device: '0000[0-9]\.tar\.idx'", capsys)
    assert not caplog.records
    monkeypatch.undo()
    check_goes_on(folder)


def test_a_disk_that_is_full_for_the_index(folder, monkeypatch, capsys):
    def full(self, items):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(energons.SqliteIndexWriter, "append_samples", full)
    match = r"wds\.partial/\.nv-meta/index\.sqlite: cannot be written: database or disk is full; the same command goes"
    check(folder, match, capsys)
    monkeypatch.undo()
    check_goes_on(folder)


def test_a_disk_that_is_full_for_the_splits(folder, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(energons.yaml, "dump", full)
    check(folder, r"No space left on device: '.*wds\.partial/\.nv-meta'", capsys)
    monkeypatch.undo()
    check_goes_on(folder)


def test_a_process_that_is_killed_while_it_indexes(folder, monkeypatch, capsys):
    def killed(self, offset):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(TarIndexWriter, "append", killed)
    check(folder, "a process of the conversion was killed", capsys)
    monkeypatch.undo()
    check_goes_on(folder)


def test_a_signal_that_energon_swallows_ends_it(folder, monkeypatch):
    """As SIGTERM's handler raises it, in the process that indexes by itself."""

    def end(self, offset):
        raise SystemExit(143)

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(TarIndexWriter, "append", end)
    with pytest.raises(SystemExit):
        convert_folder(folder)


def test_energon_is_as_before_afterwards(folder):
    pool = energons.AggregatorPool
    convert_folder(folder)
    assert energons.AggregatorPool is pool
    assert prepare._Pool is not pool
