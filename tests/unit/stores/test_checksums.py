"""Every file of a run's checkpoint is compared, or the checkpoint is refused."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.files.marks import MARK
from megatron_patch.stores import checksums
from megatron_patch.stores.checksums import FILE
from tests.unit.properties import damaged, examples, in_one_line

NAMES = ("__0_0.distcp", ".metadata", "common.pt")


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in NAMES:
        (tmp_path / name).write_text(name)
    checksums.write(tmp_path, checksums.digests(tmp_path / name for name in NAMES))
    checksums.check(tmp_path)
    return tmp_path


def lines(folder: Path) -> list[str]:
    return (folder / FILE).read_text().splitlines(keepends=True)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("lost", range(3))
def test_a_list_that_lost_a_line(folder, lost, part):
    kept = lines(folder)
    name = kept.pop(lost)[66:-1]
    (folder / FILE).write_text("".join(kept))
    with pytest.raises(ValueError, match=f"{re.escape(name)}: not in {FILE}, which lists what was written"):
        checksums.check(folder, part, 2)


def test_a_list_that_is_cut_off(folder):
    text = (folder / FILE).read_text()
    for end in range(len(text) - 1):
        (folder / FILE).write_text(text[:end])
        with pytest.raises(ValueError, match=FILE):
            checksums.check(folder)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{'0' * 64}  common.pt\n", "damaged; it lists a file twice"),
        (f"{'0' * 64}  gone\n", "gone: missing, though"),
        (f"{'0' * 64}  ../thesis.txt\n", "damaged; expected lines"),
        (f"{'0' * 64}  ..\n", "missing, though"),
        (f"{'0' * 64}  /etc/passwd\n", "damaged; expected lines"),
        (f"{'0' * 64} *common.pt\n", "damaged; expected lines"),
        ("\n", "damaged; expected lines"),
        ("\x00", "damaged; expected lines"),
    ],
)
def test_a_list_with_another_line(folder, line, says):
    with (folder / FILE).open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=says):
        checksums.check(folder)


@pytest.mark.parametrize("name", ["__0_1.distcp", "extra.pt", ".hidden", "notes.txt"])
def test_a_file_that_is_not_listed(folder, name):
    (folder / name).touch()
    with pytest.raises(ValueError, match=f"{re.escape(name)}: not in {FILE}"):
        checksums.check(folder)


def test_what_is_no_part_of_a_checkpoint(folder):
    (folder / MARK).touch()
    (folder / ".nfs000000000001").touch()
    (folder / "lost+found").mkdir()
    checksums.check(folder)


TEXT = "".join(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in NAMES).encode()


@examples
@given(damaged(TEXT) | st.binary(max_size=200))
def test_any_list_is_read_or_refused_in_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "sums"
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(data)
    in_one_line(lambda: checksums.check(folder), folder)
