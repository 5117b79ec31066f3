"""A result is whole or not there; nothing that exists is touched."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from megatron_patch.files import marks
from megatron_patch.files.whole import check_target, written_aside
from tests.unit.files.test_marks import KINDS, make_foreign, tree


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def write(target, text="whole"):
    with written_aside(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(text)


@pytest.mark.parametrize("exists", [False, True])
def test_new_or_empty_folder(tmp_path, exists):
    target = tmp_path / "a b" / "target"
    if exists:
        target.mkdir(parents=True)
    write(target)
    assert (target / "deep" / "file").read_text() == "whole"
    assert listing(target.parent) == ["target"]


def test_nothing_is_left_after_an_error(tmp_path):
    def interrupted():
        with written_aside(tmp_path / "target") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert listing(tmp_path) == []


def test_what_exists_is_kept(tmp_path):
    target = tmp_path / "target"
    write(target, "first")
    with pytest.raises(ValueError, match="target: is not empty; give a new folder"):
        write(target, "second")
    assert (target / "deep" / "file").read_text() == "first"
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: is not a folder"):
        write(tmp_path / "file")


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    write(link)
    assert listing(folder) == ["deep"]
    assert listing(tmp_path) == ["folder", "link"]


def test_what_cannot_be_replaced_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for target in (Path(), tmp_path):
        with pytest.raises(ValueError, match="is the working folder or a mount point; give a new folder in it"):
            check_target(target)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ValueError, match="dangling: is not a folder"):
        check_target(tmp_path / "dangling")


def test_what_appeared_meanwhile_is_kept(tmp_path):
    target = tmp_path / "target"

    def overtaken():
        with written_aside(target):
            target.mkdir()
            (target / "other").touch()

    with pytest.raises(ValueError, match="is not empty"):
        overtaken()
    assert listing(tmp_path) == ["target"]
    assert listing(target) == ["other"]


def test_second_writer_is_refused(tmp_path):
    target = tmp_path / "target"
    with written_aside(target) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(ValueError, match="target: another process is writing it"):
            write(target)
        assert (folder / "file").exists()
    assert listing(target) == ["file"]


def _die(target):
    with written_aside(target) as folder:
        (folder / "leftover").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    target = tmp_path / "target"
    process = multiprocessing.get_context("fork").Process(target=_die, args=(target,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert listing(tmp_path) == [".target.partial"]
    write(target)
    assert listing(tmp_path) == ["target"]
    assert listing(target) == ["deep"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_ours_beside_the_target_stays(kind, tmp_path):
    make_foreign(kind, tmp_path / ".target.partial", tmp_path / "victim")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"\.target\.partial: .*move it away"):
        write(tmp_path / "target")
    assert tree(tmp_path) == before


def test_a_target_apart_from_its_sources(tmp_path):
    source, link = tmp_path / "source", tmp_path / "link"
    (source / "deep").mkdir(parents=True)
    link.symlink_to(source)
    for target in (source / "new", source / "deep" / "new", link / "new", source, tmp_path):
        with pytest.raises(ValueError, match="lie in each other"):
            check_target(target, [source])
    with pytest.raises(ValueError, match="lie in each other"):
        check_target(tmp_path / "out", [tmp_path / ".out.partial"])
    check_target(tmp_path / "source2", [source])


def test_without_locks_a_target_is_written_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(marks, "lock", lambda *_: False)
    write(tmp_path / "target")
    assert listing(tmp_path) == ["target"]
    assert f"{tmp_path}: no locks on this file system" in capsys.readouterr().err
