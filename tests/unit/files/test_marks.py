"""Nothing of a user's is deleted, followed or overwritten where the toolkit writes."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from megatron_patch.files import marks
from megatron_patch.files.marks import MARK, beside, check_page, claim, discard, is_ours, lock, open_mark, release


def tree(folder: Path) -> dict[str, str | None]:
    return {
        str(path.relative_to(folder)): path.read_text(errors="replace") if path.is_file() else None
        for path in folder.rglob("*")
    }


def make_foreign(kind: str, place: Path, victim: Path) -> None:
    victim.mkdir()
    (victim / "thesis.txt").write_text("precious")
    if kind == "link":
        place.symlink_to(victim)
    elif kind == "link to nowhere":
        place.symlink_to(victim / "nothing")
    elif kind == "file":
        place.write_text("mine")
    elif kind == "folder":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    elif kind == "folder with a linked mark":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
        (place / MARK).symlink_to(victim / "thesis.txt")
    else:
        (place / MARK).mkdir(parents=True)


KINDS = ["link", "link to nowhere", "file", "folder", "folder with a linked mark", "folder with a mark that is one"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_ours_is_refused_and_untouched(kind, tmp_path):
    place = tmp_path / "x.partial"
    make_foreign(kind, place, tmp_path / "victim")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"x\.partial: .*move it away"):
        claim(place)
    assert tree(tmp_path) == before
    assert not is_ours(place)


def test_a_mark_that_is_a_link_after_the_look_is_not_followed(tmp_path, monkeypatch):
    place = tmp_path / "x.partial"
    place.mkdir()
    (place / MARK).symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(os, "listdir", lambda folder: [])  # what the look saw
    with pytest.raises(OSError, match=MARK):
        open_mark(place)
    assert not (tmp_path / "nowhere").exists()


def test_new_empty_and_left_folders_are_taken(tmp_path):
    place, victim = tmp_path / "x.partial", tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("precious")
    claim(place)
    (place / "deep").mkdir()
    (place / "deep" / "file").touch()
    (place / "link").symlink_to(victim)
    claim(place)
    assert list(tree(place)) == [MARK]
    assert is_ours(place)
    release(place)
    assert tree(tmp_path) == {"x.partial": None, "victim": None, "victim/thesis.txt": "precious"}
    claim(place)


def test_without_locks_the_mark_says_who_writes(tmp_path, monkeypatch):
    place = tmp_path / "x.partial"
    mark = open_mark(place)
    claim(place, mark)
    claim(place, mark)  # of this process
    (place / "file").touch()
    for alive in (f"{marks.platform.node()} 1", "elsewhere 12", "damaged"):
        (place / MARK).write_text(alive)
        with pytest.raises(ValueError, match="another process is writing it"):
            claim(place, mark)
        assert (place / "file").exists()
    (place / MARK).write_text(f"{marks.platform.node()} 99999999")
    claim(place, mark)
    assert tree(place) == {MARK: f"{marks.platform.node()} {os.getpid()}\n"}
    os.close(mark)


def test_a_mark_that_cannot_be_read_is_taken_for_anothers(tmp_path, monkeypatch):
    place = tmp_path / "x.partial"
    mark = open_mark(place)
    (place / "file").touch()

    def is_stale(*arguments):  # a mock of NFS
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "pread", is_stale)
    with pytest.raises(OSError, match="Stale"):
        claim(place, mark)
    assert (place / "file").exists()
    os.close(mark)


def test_a_removal_that_is_cut_short_can_be_gone_on_with(tmp_path, monkeypatch):
    place = tmp_path / "x.partial"
    claim(place)
    for name in "abc":
        (place / name).touch()

    def is_killed(path):
        raise PermissionError(path)

    with monkeypatch.context() as patch:
        patch.setattr(marks, "remove", is_killed)
        discard(place)
    assert is_ours(place)
    claim(place)
    discard(place)
    assert not place.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_locks(number, tmp_path, monkeypatch):
    first, second = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert lock(first)
    with pytest.raises(BlockingIOError):
        lock(second)

    def fails(*arguments):  # a mock of a file system that has no locks
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    assert not lock(second)
    os.close(first)
    os.close(second)


def test_a_lock_that_is_shared_or_waited_for(tmp_path):
    path = tmp_path / "lock"
    first, second, third = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(3))
    assert lock(first, path, shared=True)
    assert lock(second, path, shared=True)
    with pytest.raises(BlockingIOError):
        lock(third, path)
    os.close(first)
    threading.Timer(0.1, os.close, [second]).start()
    assert lock(third, path, seconds=30)
    path.rename(tmp_path / "another")
    for there in (False, True):
        if there:
            path.touch()
        with pytest.raises(BlockingIOError, match="lock: renamed or removed"):
            lock(third, path)
    os.close(third)


def test_a_name_beside(tmp_path):
    names = {beside(tmp_path / "tracker") for _ in range(9)}
    assert len(names) == 9
    assert {name.parent for name in names} == {tmp_path}


def test_pages(tmp_path):
    page, other = tmp_path / "page.html", tmp_path / "thesis.html"
    check_page(page, "<html>")
    for harmless in ("", "<html>and more"):
        page.write_text(harmless)
        check_page(page, "<html>")
    for content in ("<htm", "thesis"):
        other.write_text(content)
        with pytest.raises(ValueError, match="is there, and not written by this command"):
            check_page(other, "<html>")
    link = tmp_path / "link"
    link.symlink_to(page)
    for place in (link, tmp_path, Path("/dev/null")):
        with pytest.raises(ValueError, match="is a link, a folder or a device"):
            check_page(place, "<html>")
