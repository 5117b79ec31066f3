"""Faults that must do no harm, in the converter: killed, no space, broken disks.

Each asserts how it ends, what the one line on stderr names, and that what was good before still is.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_patch.conversion.commands import main
from megatron_patch.conversion.plan import open_mcore
from megatron_patch.families.llava import read_config
from megatron_patch.files.whole import written_aside
from megatron_patch.tensor_io import disk
from tests.end_to_end.conversions import as_flags, exporting, files, importing, refused
from tests.forked import PROCESSES

IMPORT_POINTS = (
    "locked",
    "bytes written",
    "weights written",
    "file finished",
    "manifest written",
    "shards synced",
    "latest_checkpointed_iteration.txt written",
    "synced",
    "renamed",
)
EXPORT_POINTS = ("locked", "bytes written", "weights written", "synced", "renamed")


def _die_at(point: str, arguments: list[str]) -> None:
    left = {"bytes written": 40}.get(point, 1)  # in the middle

    def reached(name: str) -> None:
        nonlocal left
        left -= name == point
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    disk.reached = reached
    main(arguments)
    os._exit(3)  # the point was never reached


def killed(point: str, arguments: list[str]) -> None:
    process = PROCESSES.Process(target=_die_at, args=(point, arguments))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("point", IMPORT_POINTS)
def test_killed_while_importing(tmp_path, mistral, clip, mcore, point):
    """Nothing is there, or all of it; the next run clears up and succeeds."""
    target = tmp_path / "target"
    killed(point, importing(mistral, clip, target))
    if point != "renamed":
        assert not target.exists()
        assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]
        assert main(importing(mistral, clip, target)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    reference = files(mcore)
    found = files(target)
    assert found.keys() == reference.keys()
    assert all(found[name] == reference[name] for name in reference)


@pytest.mark.parametrize(
    "point", ["bytes written", "weights written", "file finished", "latest_checkpointed_iteration.txt written"]
)
def test_killed_while_writing_torch_dist(tmp_path, mcore, point):
    target = tmp_path / "target"
    arguments = as_flags(
        source_llm_ckpt_path=mcore, target_ckpt_path=target, precision="fp32", ckpt_format="torch_dist"
    )
    killed(point, arguments)
    partial = tmp_path / ".target.partial"
    assert list(tmp_path.iterdir()) == [partial]
    if point != "latest_checkpointed_iteration.txt written":
        (partial / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises((ValueError, OSError)):
        open_mcore(partial, read_config(mcore))
    assert main(arguments) == 0
    found, expected = (open_mcore(folder, read_config(mcore)) for folder in (target, mcore))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("point", EXPORT_POINTS)
def test_killed_while_exporting(tmp_path, mcore, hf, point):
    target = tmp_path / "target"
    killed(point, exporting(mcore, target))
    if point != "renamed":
        assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]
        assert main(exporting(mcore, target)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert files(target) == files(hf)


@pytest.mark.parametrize(
    "point", ["bytes written", "weights written", "file finished", "latest_checkpointed_iteration.txt written"]
)
def test_what_a_killed_one_leaves_is_no_checkpoint(tmp_path, mistral, clip, mcore, point):
    """Even if somebody takes the hidden folder for one: no tracker, and no file without its directory loads."""
    killed(point, importing(mistral, clip, tmp_path / "target"))
    partial = tmp_path / ".target.partial"
    with pytest.raises((ValueError, OSError)):
        open_mcore(partial, read_config(mcore))
    if point != "latest_checkpointed_iteration.txt written":
        (partial / "latest_checkpointed_iteration.txt").write_text("release")
        with pytest.raises((ValueError, OSError)):
            open_mcore(partial, read_config(mcore))


def fails(number: int, call: Callable, count: int) -> Callable:
    """`call`, which raises this error at the count-th time, and ever after."""
    calls = iter(range(1, 1 << 30))

    def failing(*arguments: object) -> object:
        if next(calls) >= count:
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    return failing


@pytest.mark.parametrize(
    ("function", "number", "count"),
    [
        ("pwrite", errno.ENOSPC, 1),
        ("pwrite", errno.ENOSPC, 300),
        ("pwrite", errno.EIO, 100),
        ("preadv", errno.EIO, 1),
        ("preadv", errno.EIO, 40),
        ("fsync", errno.EIO, 1),
        ("ftruncate", errno.EFBIG, 1),
    ],
)
def test_a_disk_that_fails(tmp_path, monkeypatch, capsys, mistral, clip, function, number, count):
    """Full, or broken, at any moment: one line with the file, and nothing is left."""
    monkeypatch.setattr(os, function, fails(number, getattr(os, function), count))
    where = ".safetensors" if function == "preadv" else ".target.partial/"
    line = refused(capsys, importing(mistral, clip, tmp_path / "target"), os.strerror(number))
    assert where in line
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_known_before(tmp_path, monkeypatch, capsys, mistral, clip, mcore):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    for arguments in (importing(mistral, clip, tmp_path / "target"), exporting(mcore, tmp_path / "target")):
        refused(capsys, arguments, tmp_path / "target", "needs 0.07 GB, and 0.00 GB are free")
        assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path, capsys, mistral, clip):
    target = tmp_path / "target"
    with written_aside(target) as folder:
        (folder / "file").write_text("first")
        refused(capsys, importing(mistral, clip, target), target, "another process is writing it")
        assert (folder / "file").read_text() == "first"
    assert files(target) == {"file": b"first"}


def test_order_on_the_disk(tmp_path, monkeypatch, mistral, clip):
    """Files, then the folders that name them, then the tracker, then the rename, then the folder above."""
    events: list[tuple[str, Path]] = []
    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name), events))
    target = tmp_path / "target"
    assert main(importing(mistral, clip, target)) == 0
    partial = tmp_path / ".target.partial"
    renames = [event for event in events if event[0] == "rename"]
    (_, aside), second_rename = renames
    assert (aside.parent, second_rename) == (partial, ("rename", partial))
    assert aside.name.startswith(".latest_checkpointed_iteration.txt.")
    first, second = (events.index(event) for event in renames)
    # What the proof found is written after the tracker, which is within the folder that is renamed last.
    names = sorted(path.relative_to(target) for path in target.rglob("*") if path.name.endswith((".pt", ".json")))
    shards = [path for path in names if path.name != "parity.json"]
    assert len(shards) > 3
    for path in shards:
        folder = last(events, partial / path.parent, first)
        assert last(events, partial / path, first) < folder
    assert last(events, aside, first) > last(events, partial / "release", first)
    for path in target.rglob("*"):
        assert (
            last(events, partial / path.relative_to(target), second) < last(events, partial, second) or path.is_file()
        )
    assert events[second + 1] == ("fsync", tmp_path)


def recorded(name: str, call: Callable, events: list[tuple[str, Path]]) -> Callable:
    def recording(first: object, *others: object) -> object:
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else first
        events.append((name, Path(path)))
        return call(first, *others)

    return recording


def last(events: list[tuple[str, Path]], path: Path, before: int) -> int:
    """When a path was last brought to the disk before that event."""
    return max(number for number, event in enumerate(events[:before]) if event == ("fsync", path))
