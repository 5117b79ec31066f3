"""What is whole is saved, and what lies in its way is no run's to delete."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_patch.families.llava import read_config
from megatron_patch.training import resume, saving
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.resume import Progress
from megatron_patch.training.saving import Saver
from tests import tiny_runs
from tests.unit.files.test_marks import KINDS, make_foreign, tree

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def saver(mcore, tmp_path):
    config = tiny_runs.config(mcore, tmp_path, keep_checkpoints=1)
    chunks, _, optimizer, _ = start_or_resume(config, read_config(mcore), None)
    return Saver(config, chunks, optimizer)


def test_old_iterations_that_cannot_be_removed_are_warnings(saver, tmp_path, monkeypatch, caplog):
    folder, elsewhere = tmp_path / "checkpoint", tmp_path / "other disk"
    saver.save(Progress(1, 4), b"position")
    shutil.move(folder / "iter_0000001", elsewhere)
    (folder / "iter_0000001").symlink_to(elsewhere)
    (folder / "iter_0000000").mkdir()
    (folder / "iter_0000000" / "notes.txt").write_text("mine")
    before = tree(elsewhere)
    with caplog.at_level(logging.WARNING):
        saver.save(Progress(2, 8), b"position")
    assert tree(elsewhere) == before
    assert (folder / "iter_0000000" / "notes.txt").exists()
    assert caplog.text.count("kept, since it is a link or no run's") == 2

    remove = shutil.rmtree

    def busy(path, *arguments, **options):  # a mock of NFS, where a file that is held open stays
        if path == folder / "iter_0000002":
            raise OSError(16, "Device or resource busy")
        remove(path, *arguments, **options)

    monkeypatch.setattr(saving.shutil, "rmtree", busy)
    with caplog.at_level(logging.WARNING):
        saver.save(Progress(3, 12), b"position")
    assert "iter_0000002: cannot be removed (Device or resource busy)" in caplog.text
    assert resume.latest(folder) == folder / "iter_0000003"


def test_a_run_goes_on_from_the_iteration_that_is_asked_for(mcore, tmp_path):
    config = tiny_runs.config(mcore, tmp_path)
    chunks, _, optimizer, _ = start_or_resume(config, read_config(mcore), None)
    for iteration in (1, 2):
        Saver(config, chunks, optimizer).save(Progress(iteration, 4 * iteration), b"position")
    assert resume.find(config).name == "iter_0000002"
    asked = replace(config, checkpoint=replace(config.checkpoint, ckpt_step=1))
    assert resume.find(asked).name == "iter_0000001"
    (tmp_path / "checkpoint" / "iter_0000001").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"--ckpt-step 1: .*iter_0000001 is missing; there are: iter_0000002"):
        resume.find(asked)


@pytest.mark.parametrize("kind", ["link", "link to nowhere", "file", "folder"])
def test_what_lies_at_an_iterations_name_stays_under_another(kind, saver, tmp_path):
    folder = tmp_path / "checkpoint"
    make_foreign(kind, folder / "iter_0000001", tmp_path / "victim")
    saver.save(Progress(1, 4), b"position")
    assert resume.latest(folder) == folder / "iter_0000001"
    assert not (folder / "iter_0000001").is_symlink()
    assert (tmp_path / "victim" / "thesis.txt").read_text() == "precious"
    (kept,) = folder.glob("iter_0000001.*")
    assert kept.is_symlink() or kept.is_file() or (kept / "notes.txt").exists()


def test_a_link_to_a_checkpoint_at_an_iterations_name_stays_too(saver, tmp_path):
    folder, elsewhere = tmp_path / "checkpoint", tmp_path / "elsewhere"
    saver.save(Progress(1, 4), b"position")
    (folder / "iter_0000001").rename(elsewhere)
    (folder / "iter_0000001").symlink_to(elsewhere)
    before = tree(elsewhere)
    saver.save(Progress(1, 4), b"position")
    (kept,) = folder.glob("iter_0000001.*")
    assert kept.resolve() == elsewhere
    assert tree(elsewhere) == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_the_way_of_a_save_is_said_at_the_start(kind, saver, mcore, tmp_path):
    folder, victim = tmp_path / "checkpoint", tmp_path / "victim"
    make_foreign(kind, folder / "iter_0000001.partial", victim)
    before = tree(folder), tree(victim)
    with pytest.raises(ValueError, match=r"iter_0000001\.partial: .*move it away"):
        start_or_resume(saver.config, read_config(mcore), None)
    with pytest.raises(ValueError, match=r"iter_0000001\.partial: .*move it away"):
        saver.save(Progress(1, 4), None)
    assert (tree(folder), tree(victim)) == before


def test_a_tracker_that_is_written_follows_no_link(saver, tmp_path):
    folder, victim = tmp_path / "checkpoint", tmp_path / "thesis.txt"
    victim.write_text("precious")
    for name in (f"{saving.TRACKER}.partial", saving.TRACKER):
        (folder / name).symlink_to(victim)
    saver.save(Progress(1, 4), None)
    assert victim.read_text() == "precious"
    assert (folder / saving.TRACKER).read_text() == "1"


@pytest.mark.parametrize(
    ("function", "step"),
    [("mkdir", "make a folder"), ("write_bytes", "write a file"), ("rename", "rename a folder")],
)
def test_a_folder_where_no_save_is_possible_is_named_before_training(function, step, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    resume.try_save(folder)
    assert not list(folder.iterdir())

    def fails(*arguments, **options):  # a mock of a file system
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, function, fails)
    with pytest.raises(OSError, match=f"{folder}: a run cannot be saved there, since it fails to {step} .Operation"):
        resume.try_save(folder)
    assert not list(folder.iterdir())


def test_a_run_tries_a_save_when_it_looks_for_a_checkpoint(mcore, tmp_path, monkeypatch):
    config, tried = tiny_runs.config(mcore, tmp_path), []
    monkeypatch.setattr(resume, "try_save", tried.append)
    assert resume.find(config) is None
    assert tried == [config.checkpoint.folder]


def test_a_file_that_is_not_on_the_disk_is_said_before_training(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    folder.mkdir()

    def fails(descriptor):  # a mock of a disk
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=r"fails to have it on the disk .Input/output error"):
        resume.try_save(folder)
    assert not list(folder.iterdir())
