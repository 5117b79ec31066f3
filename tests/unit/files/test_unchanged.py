"""A source that another program writes meanwhile is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_patch.files.unchanged import Unchanged


def write(path: Path, text: str = "0123456789") -> Path:
    path.write_text(text)
    os.utime(path, ns=(10**18, 10**18))
    return path


def replaced(path):
    os.replace(write(path.with_name("new"), "9876543210"), path)


def appended(path):
    path.write_text("0123456789+")
    os.utime(path, ns=(10**18, 10**18))


def written_in_place(path):
    path.write_text("9876543210")


@pytest.mark.parametrize("change", [replaced, appended, written_in_place])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model", "1.distcp", ".metadata"])
def test_a_change_is_noticed(tmp_path, change, name):
    source = tmp_path / "source"
    source.mkdir()
    path = write(source / name)
    for places in ([source, None], [path]):
        read = Unchanged(places)
        read.check()
        change(path)
        with pytest.raises(ValueError, match=f"{name}: changed while it was read"):
            read.check()
        write(path, "0123456789")


def test_what_does_not_change_what_was_read(tmp_path):
    path, log = write(tmp_path / "model.safetensors"), write(tmp_path / "train.log")
    read = Unchanged([tmp_path, tmp_path / "none"])
    log.write_text("a new line")
    (tmp_path / "below").mkdir()
    write(tmp_path / "new.json")
    path.chmod(0o400)
    read.check()
    path.unlink()
    read.check()
