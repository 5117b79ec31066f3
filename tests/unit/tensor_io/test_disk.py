"""Kernels and file systems that lack something: what is only for speed or safety ends nothing."""

from __future__ import annotations

import errno
import mmap
import os
import stat

import pytest

from megatron_patch.tensor_io import disk


def test_memory_without_huge_pages(monkeypatch):
    class Memory(mmap.mmap):  # a mock of a kernel that has none
        def madvise(self, *arguments):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(disk.mmap, "mmap", Memory)
    assert len(disk.aligned_buffer(5000)) == 8192


@pytest.mark.parametrize("number", disk.NOT_OF_FOLDERS)
def test_a_folder_that_cannot_be_synced(number, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    disk.sync_tree(tmp_path)

    def fails(descriptor):  # a mock of a network file system
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    disk.sync_tree(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINVAL])
def test_a_file_that_cannot_be_synced(number, tmp_path, monkeypatch):
    (tmp_path / "file").touch()

    def fails(descriptor):  # a mock of a disk
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="file") as error:
        disk.sync_tree(tmp_path)
    assert error.value.errno == number


def test_a_file_system_that_refuses_direct_reads(tmp_path, monkeypatch):
    """It opens files for them, and says no at each."""
    content = os.urandom(3 * disk.SMALL)
    (tmp_path / "file").write_bytes(content)
    file = disk.InputFile(tmp_path / "file")
    file.direct = file.direct or os.open(tmp_path / "file", os.O_RDONLY)  # where this file system has none either
    preadv, refused = os.preadv, []

    def read(descriptor, buffers, offset):
        if descriptor == file.direct:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    buffer = disk.aligned_buffer(4 * disk.SMALL)
    assert bytes(file.read(5, 2 * disk.SMALL, buffer)) == content[5 : 5 + 2 * disk.SMALL]
    assert refused
    file.close()
