"""torch.save's format: torch and zipfile read what is written here, and what torch writes is described."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.stores.mm_projector import NAMES, read_mm_projector
from megatron_patch.stores.reader import open_torch_file, stored_view
from megatron_patch.tensor_io.archives import Stored, open_archive
from megatron_patch.tensor_io.crc32 import combine
from megatron_patch.tensor_io.disk import OutputFile
from megatron_patch.tensor_io.stream import Target, copy, read
from megatron_patch.tensor_io.torch_zip import TorchArchive, describe
from megatron_patch.tensor_io.view import View

TENSORS = {
    "matrix": torch.randn(30, 70),
    "vector": torch.randn(5).bfloat16(),
    "scalar": torch.tensor(3.0, dtype=torch.float16),
    "deep": torch.arange(24).reshape(2, 3, 4),
    "flags": torch.tensor([True, False]),
    "none": torch.empty(0, 4),
}
PLAIN = {"version": 3.0, "args": {"eps": 1e-5, "name": "ä", "sizes": [1, 2]}}


def write(path: Path, finish: bool = True, start: int = 0) -> None:
    model = {name: torch.empty_like(tensor, device="meta") for name, tensor in TENSORS.items()}
    file = OutputFile(path)
    archive = TorchArchive(file, {"model": {**model, "_extra_state": None}, **PLAIN}, start)
    targets = [
        Target(name, View.of_tensor(tensor, name), file, offset, has_crc=True)
        for (name, tensor), offset in zip(TENSORS.items(), archive.offsets, strict=True)
    ]
    copy(target for target in targets if target.view.nbytes)
    if finish:
        archive.finish([target.crc for target in targets])
        assert path.stat().st_size == start + archive.size
    file.close()


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it(tmp_path, mmap):
    write(tmp_path / "file.pt")
    content = torch.load(tmp_path / "file.pt", weights_only=True, mmap=mmap)
    model = content.pop("model")
    assert content == PLAIN
    assert model.pop("_extra_state") is None
    assert list(model) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert model[name].dtype == tensor.dtype
        assert torch.equal(model[name], tensor), name


def test_the_archive_is_sound(tmp_path):
    """Every record's CRC is right, none is compressed, and tensors begin at blocks."""
    write(tmp_path / "file.pt")
    with zipfile.ZipFile(tmp_path / "file.pt") as archive:
        assert archive.testzip() is None
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    with (tmp_path / "file.pt").open("rb") as file:
        assert all(
            stored.offset % 4096 == 0 for stored in describe(open_archive(file))["model"].values() if stored is not None
        )


def test_the_same_weights_give_the_same_file(tmp_path):
    write(tmp_path / "a.pt")
    write(tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_an_unfinished_file_does_not_load(tmp_path):
    write(tmp_path / "file.pt", finish=False)
    with pytest.raises((RuntimeError, OSError)):
        torch.load(tmp_path / "file.pt", weights_only=True)
    with pytest.raises((zipfile.BadZipFile, OSError)):
        zipfile.ZipFile(tmp_path / "file.pt")


def test_what_torch_writes_is_described(tmp_path):
    """A file of torch.save: shared storages, parameters, part of a storage."""
    base = torch.randn(10, 4)
    state = OrderedDict(a=base, tied=base, part=base[3:5], parameter=torch.nn.Parameter(base + 1), **TENSORS)
    torch.save(state, tmp_path / "file.pt")
    found = open_torch_file(tmp_path / "file.pt")
    assert all(isinstance(value, Stored) for value in found.values())
    assert found["a"] == found["tied"]
    tensors = read({name: stored_view(tmp_path / "file.pt", name, value) for name, value in found.items()})
    for name, tensor in state.items():
        assert torch.equal(tensors[name], tensor), name


def test_tensors_that_are_no_byte_range_are_mapped(tmp_path):
    tensor = torch.randn(4, 6)
    torch.save({"x": tensor.T}, tmp_path / "file.pt")
    found = open_torch_file(tmp_path / "file.pt")["x"]
    assert isinstance(found, torch.Tensor)
    assert torch.equal(read({"x": stored_view(tmp_path / "file.pt", "x", found)})["x"], tensor.T)


@pytest.mark.parametrize("start", [0, 8192])
def test_an_archive_within_a_file(tmp_path, start):
    """As in a .distcp file: torch reads the piece, and `describe` says where in the file its tensors lie."""
    write(tmp_path / "file", start=start)
    data = (tmp_path / "file").read_bytes()
    assert not any(data[:start])
    assert torch.equal(torch.load(io.BytesIO(data[start:]), weights_only=True)["model"]["deep"], TENSORS["deep"])
    stored = describe(open_archive(io.BytesIO(data[start:])), start)["model"]["matrix"]
    matrix = torch.frombuffer(bytearray(data[stored.offset :][: TENSORS["matrix"].nbytes]), dtype=torch.float32)
    assert torch.equal(matrix.view(stored.shape), TENSORS["matrix"])


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_crcs_of_pieces_are_put_together(first, second):
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def flip(path: Path, value: float) -> None:
    """Change the one place in the file that holds `value`."""
    content = bytearray(path.read_bytes())
    place = content.index(torch.tensor([value]).numpy().tobytes())
    content[place + 1] ^= 0x10
    path.write_bytes(content)


def whole_records(path):
    torch.save({"a": torch.arange(5000.0).reshape(50, 100), "b": torch.full((7,), 0.5)}, path)


def one_record(path):
    """Tensors that are cut out of one storage, as Megatron-LM's parameters are, with bytes between and after."""
    flat = torch.arange(6000.0)
    torch.save({"a": flat[10:5010].view(50, 100), "b": flat[5010:5017], "twin": flat[5010:5017]}, path)


def copied(path: Path, names: str, tmp_path: Path) -> None:
    content = open_torch_file(path)
    file = OutputFile(tmp_path / "copy")
    try:
        views = {name: stored_view(path, name, content[name]) for name in names}
        copy([Target(name, view, file, 40000 * number) for number, (name, view) in enumerate(views.items())])
    finally:
        file.close()


@pytest.mark.parametrize("save", [whole_records, one_record])
def test_what_is_whole_is_copied(tmp_path, save):
    save(tmp_path / "file.pt")
    copied(tmp_path / "file.pt", "ab", tmp_path)
    content = open_torch_file(tmp_path / "file.pt")
    assert torch.equal(
        read({"a": stored_view(tmp_path / "file.pt", "a", content["a"])})["a"], torch.load(tmp_path / "file.pt")["a"]
    )


@pytest.mark.parametrize(
    ("save", "value", "names"),
    [
        (whole_records, 4321.0, "ab"),
        (one_record, 4321.0, "ab"),
        (one_record, 5012.0, "ab"),
        (one_record, 5.0, "ab"),  # before the first tensor
        (one_record, 5900.0, "ab"),  # after the last one
        (one_record, 4321.0, "b"),  # in one that nothing needs
    ],
)
def test_a_flipped_bit_contradicts_the_crc(tmp_path, save, value, names):
    save(tmp_path / "file.pt")
    flip(tmp_path / "file.pt", value)
    with pytest.raises(ValueError, match=r"file\.pt: \w( and 1 more)?: not what was written \(CRC-32 differs\)"):
        copied(tmp_path / "file.pt", names, tmp_path)


def test_part_of_a_tensor_is_compared_with_the_rest(tmp_path):
    whole_records(tmp_path / "file.pt")
    flip(tmp_path / "file.pt", 4321.0)
    view = stored_view(tmp_path / "file.pt", "a", open_torch_file(tmp_path / "file.pt")["a"])
    file = OutputFile(tmp_path / "copy")
    with pytest.raises(ValueError, match="CRC-32 differs"):
        copy([Target("a", view.narrow(0, 0, 5), file, 0)])
    file.close()


def test_a_file_without_crcs_is_taken(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        whole_records(tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    copied(tmp_path / "file.pt", "ab", tmp_path)


def test_a_projector_and_what_torch_has_to_read_are_compared(tmp_path):
    torch.save({name: torch.full((3,), float(number)) for number, name in enumerate(NAMES, 7)}, tmp_path / "projector")
    assert len(read_mm_projector(tmp_path / "projector")) == 4
    flip(tmp_path / "projector", 9.0)
    with pytest.raises(ValueError, match=r"projector: .*CRC-32 differs"):
        read_mm_projector(tmp_path / "projector")
    torch.save({"a": torch.arange(6.0).view(2, 3).t()}, tmp_path / "turned")
    assert torch.equal(open_torch_file(tmp_path / "turned")["a"], torch.arange(6.0).view(2, 3).t())
    flip(tmp_path / "turned", 4.0)
    with pytest.raises(ValueError, match=r"turned: .*CRC-32 differs"):
        open_torch_file(tmp_path / "turned")
