"""Headers written by hand: tarfile's bytes are the judge."""

import io
import os
import tarfile

import pytest

from megatron_patch.prepare import tar
from megatron_patch.prepare.tar import TarWriter

MEMBERS = [("a.jpg", b""), ("a.json", b"x" * 511), ("b.jpg", b"y" * 512), ("k" * 96 + ".jpg", os.urandom(700_000))]


@pytest.mark.parametrize("count", [0, 1, 4, 2500])
def test_bytes_are_those_of_tarfile(count, tmp_path):
    members = (MEMBERS * count)[:count] if count <= 4 else [(f"{index}.json", b"{}") for index in range(count)]
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with (tmp_path / "a.tar").open("wb") as file:
        writer = TarWriter(file.fileno())
        for name, data in members:
            writer.add(name, data)
        writer.close()
    assert (tmp_path / "a.tar").read_bytes() == expected.getvalue()
    assert writer.size == len(expected.getvalue())


def test_a_write_that_took_only_a_part_is_finished(tmp_path, monkeypatch):
    whole = os.writev
    monkeypatch.setattr(tar.os, "writev", lambda descriptor, pieces: whole(descriptor, [b"".join(pieces)[:700]]))
    with (tmp_path / "a.tar").open("wb") as file:
        writer = TarWriter(file.fileno())
        writer.add("a.jpg", b"z" * 3000)
        writer.close()
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.extractfile("a.jpg").read() == b"z" * 3000
