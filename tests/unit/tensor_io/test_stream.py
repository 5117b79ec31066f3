"""Copying views: every byte, in small buffers, each source byte once, and errors from any stage."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
import torch

from megatron_patch.conversion import plan
from megatron_patch.tensor_io import disk, stream
from megatron_patch.tensor_io.disk import InputFile, OutputFile
from megatron_patch.tensor_io.stream import Target, as_bytes, copy, read
from megatron_patch.tensor_io.view import Source, View


@pytest.fixture(params=["direct", "plain"])
def io(request, monkeypatch):
    """With and without O_DIRECT, of which reads and writes of one block are made too."""
    monkeypatch.setattr(disk, "SMALL", 0)
    if request.param == "plain":
        monkeypatch.setattr(disk, "DIRECT", 0)


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Bytes asked for in each read."""
    lengths = []
    original = InputFile.read
    monkeypatch.setattr(
        InputFile,
        "read",
        lambda self, offset, length, buffer: lengths.append(length) or original(self, offset, length, buffer),
    )
    return lengths


def stored(path: Path, tensor: torch.Tensor, lead: int = 13, digests=()) -> View:
    """A tensor in a file, after some other bytes."""
    path.write_bytes(b"x" * lead + as_bytes(tensor).numpy().tobytes())
    source = Source(f"{path}: it", tensor.dtype, *tensor.shape, path=path, offset=lead, digests=tuple(digests))
    return View.of(source, tensor.shape)


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor.contiguous()).numpy().tobytes()).hexdigest()


@pytest.mark.usefixtures("io")
@pytest.mark.parametrize("buffer", [1, 5000, 100_000])
@pytest.mark.parametrize("lead", [0, 13, 4096])
def test_columns_are_fanned_out_in_one_pass(tmp_path, monkeypatch, counted, buffer, lead):
    """Rows for two ranks, with buffers from less than a row on: each byte read once, digests and CRC right."""
    monkeypatch.setattr(stream, "BUFFER", buffer)
    tensor = torch.randn(70, 300)
    whole = stored(tmp_path / "source", tensor, lead)
    halves = [whole.narrow(1, 0, 100), whole.narrow(1, 100, 200)]
    files = [OutputFile(tmp_path / f"target {i}") for i in range(2)]
    passed = []
    targets = [Target(str(i), halves[i], files[i], 4096 * i, [30, 40], True) for i in range(2)]
    copy(targets, passed.append)
    assert sum(counted) == tensor.nbytes == sum(passed)
    for target, expected, file in zip(targets, tensor.split([100, 200], 1), files, strict=True):
        file.close()
        data = file.path.read_bytes()[target.offset :]
        assert data == as_bytes(expected.contiguous()).numpy().tobytes()
        assert target.crc == zlib.crc32(data)
        assert target.digests == [sha(expected[:30]), sha(expected[30:])]


def test_types_are_converted_on_the_way(tmp_path):
    tensor = torch.randn(7, 5)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(read({"x": stored(tmp_path / "a", tensor).to(dtype)})["x"], tensor.to(dtype))


def test_what_fp16_cannot_hold_is_refused(tmp_path):
    view = stored(tmp_path / "a", torch.tensor([[1.0, 70000.0]])).to(torch.float16)
    with pytest.raises(ValueError, match=f"{tmp_path / 'a'}: it: holds values that fp16 cannot"):
        read({"x": view})
    view = stored(tmp_path / "a", torch.tensor([[1.0, float("inf")]])).to(torch.float16)
    assert read({"x": view})["x"][0, 1] == float("inf")


@pytest.mark.usefixtures("io")
def test_a_source_that_ends_early(tmp_path):
    view = stored(tmp_path / "a", torch.randn(100, 100))
    with (tmp_path / "a").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(ValueError, match="a: ends before byte 40013; copy or convert it again"):
        read({"x": view})


@pytest.mark.parametrize("place", [0, 999, 1000, 39_999])
def test_a_flipped_bit_is_found(tmp_path, place):
    tensor = torch.randn(100, 100)
    digests = [(10, sha(tensor[:10])), (90, sha(tensor[10:]))]
    view = stored(tmp_path / "a", tensor, digests=digests)
    assert torch.equal(read({"x": view})["x"], tensor)
    data = bytearray((tmp_path / "a").read_bytes())
    data[13 + place] ^= 4
    (tmp_path / "a").write_bytes(data)
    rows = "0 to 9" if place < 4000 else "10 to 99"
    with pytest.raises(ValueError, match=f"a: it: rows {rows} are not what was written"):
        read({"x": view})


@pytest.mark.parametrize("order", [(0, 50), (50, 0), (20, 60)])
def test_a_flipped_bit_is_found_where_only_a_part_is_read(tmp_path, order):
    """A run of which rows were left out, or came in another order, is read again as a whole."""
    tensor = torch.randn(100, 10)
    view = stored(tmp_path / "a", tensor, digests=[(100, sha(tensor))])
    parts = {str(start): view.narrow(0, start, 30) for start in order}
    assert torch.equal(read(parts)[str(order[0])], tensor[order[0] : order[0] + 30])
    data = bytearray((tmp_path / "a").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match="not what was written"):
        read(parts)


def test_what_was_not_needed_is_not_read(tmp_path, counted):
    tensor = torch.randn(100, 10)
    view = stored(tmp_path / "a", tensor, digests=[(50, sha(tensor[:50])), (50, sha(tensor[50:]))])
    read({"x": view.narrow(0, 0, 50)})
    assert sum(counted) == 50 * 40


@pytest.mark.parametrize("stage", ["cut", "checksum"])
def test_an_error_in_a_stage_ends_all(tmp_path, monkeypatch, stage):
    def fail(band):
        raise OSError(5, "Input/output error", "somewhere")

    monkeypatch.setattr(stream, stage, fail)
    monkeypatch.setattr(stream, "BUFFER", 4096)
    before = threading.active_count()
    with pytest.raises(OSError, match="somewhere"):
        read({"x": stored(tmp_path / "a", torch.randn(500, 50))})
    assert threading.active_count() == before


def test_tensors_that_are_made_are_made_once_and_let_go():
    made = []

    def make():
        made.append(1)
        return torch.arange(40.0).reshape(8, 5)

    view = View.made(make, (8, 5), torch.float32, "made")
    result = read({"a": view.narrow(0, 0, 4), "b": view.narrow(0, 4, 4), "c": view.narrow(1, 0, 2)})
    assert torch.equal(torch.cat([result["a"], result["b"]]), make())
    assert len(made) == 2
    (source,) = view.sources
    assert "made" not in vars(source)


def test_a_tensor_without_values():
    view = View.of_tensor(torch.empty(0, 3), "none")
    assert read({"x": view})["x"].shape == (0, 3)


SPARSE = """
import resource, sys, torch
from pathlib import Path
from megatron_patch.tensor_io.stream import Target, copy
from megatron_patch.tensor_io.view import Source, View

class Nowhere:
    def write(self, offset, data):
        pass

rows = int(sys.argv[2])
view = View.of(Source("it", torch.bfloat16, rows, 4096, path=Path(sys.argv[1])), (rows, 4096))
parts = [view.narrow(1, 1024 * rank, 1024) for rank in range(4)]
copy([Target(str(rank), part, Nowhere(), 0, [rows], True) for rank, part in enumerate(parts)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_peak_memory_in_a_process_of_its_own(tmp_path):
    """A gigabyte takes what 64 MB take: the buffers, whatever else torch does."""
    peaks = []
    for rows in (8192, 131072):
        (tmp_path / "source").touch()
        os.truncate(tmp_path / "source", rows * 8192)
        command = [sys.executable, "-c", SPARSE, str(tmp_path / "source"), str(rows)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
        peaks.append(int(result.stdout))
    assert peaks[1] < peaks[0] + 30, peaks


def test_memory_does_not_depend_on_the_size(tmp_path, monkeypatch):
    """Buffers are made once for all tensors, and only as many as are under way."""
    monkeypatch.setattr(stream, "BUFFER", 1 << 16)
    sizes = []
    original = stream.aligned_buffer
    monkeypatch.setattr(stream, "aligned_buffer", lambda size: sizes.append(size) or original(size))
    target = OutputFile(tmp_path / "target")
    views = [stored(tmp_path / str(i), torch.randn(1000, 100)) for i in range(5)]
    copy([Target(str(i), view, target, 400_000 * i) for i, view in enumerate(views)])
    target.close()
    assert sum(sizes) <= 2 * stream.NUM_BANDS * (1 << 16)


def test_the_mean_of_a_checked_table_reads_it_once(tmp_path, counted, monkeypatch):
    """In pieces, none of which has the rest of the table read for its sha256."""
    monkeypatch.setattr(plan, "BUFFER", 10 * 16)
    table = torch.randn(40, 4)
    view = stored(tmp_path / "a", table, digests=[(40, sha(table))])
    longer = read({"it": plan.append_mean_rows(view, 42)})["it"]
    assert torch.equal(longer[:40], table)
    torch.testing.assert_close(longer[41], table.mean(0))
    assert sum(counted) == 2 * table.nbytes
