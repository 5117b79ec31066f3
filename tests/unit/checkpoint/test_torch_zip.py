"""torch.save's format: torch and zipfile read what is written here, and what torch writes is described."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from copy import copy as copy_of
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch import opcodes
from megatron_patch.archives import Stored, open_archive
from megatron_patch.checkpoint.crc32 import combine
from megatron_patch.checkpoint.disk import OutputFile
from megatron_patch.checkpoint.mm_projector import NAMES, read_mm_projector
from megatron_patch.checkpoint.reader import load_tensors, open_torch_file, stored_view
from megatron_patch.checkpoint.stream import Target, copy, read
from megatron_patch.checkpoint.torch_zip import Skipped, TorchArchive, describe
from megatron_patch.checkpoint.view import View
from tests.unit.properties import damaged, examples, one_line

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
    """Tensors that are cut out of one storage, as Megatron-LM's parameters are, with bytes between and behind."""
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
        (one_record, 5900.0, "ab"),  # behind the last one
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


def test_a_file_of_torch_before_2_1_is_read(tmp_path):
    """It has no record of the byte order, nor of the alignment."""
    content = {"a": torch.arange(6.0).view(2, 3), "turned": torch.arange(6.0).view(2, 3).t()}
    for names in (["a"], ["a", "turned"]):  # described; and loaded by torch
        torch.save({name: content[name] for name in names}, tmp_path / "new.bin")
        with zipfile.ZipFile(tmp_path / "new.bin") as new, zipfile.ZipFile(tmp_path / "old.bin", "w") as old:
            for name in new.namelist():
                if not name.endswith("/byteorder") and "/.data" not in name:
                    old.writestr(name, new.read(name))
        found = open_torch_file(tmp_path / "old.bin")
        assert isinstance(found["a"], Stored if names == ["a"] else torch.Tensor)
        tensors = read({name: stored_view(tmp_path / "old.bin", name, found[name]) for name in names})
        assert all(torch.equal(tensors[name], content[name]) for name in names)


def test_an_archive_of_something_else_is_said_to_be_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.bin", "w") as archive:
        archive.writestr("word/document.xml", b"")
    with pytest.raises(ValueError, match=r"file\.bin: .*has no record data\.pkl"):
        open_torch_file(tmp_path / "file.bin")


def rewritten(
    path: Path, compression: int = zipfile.ZIP_STORED, twice: str = "", upper: bool = False, **records: bytes
) -> None:
    """A file of torch.save with other records. `upper`: the one that is there twice has a name in capitals."""
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, records.get(name.rpartition("/")[2].replace(".", "_"), data))
        if twice:
            name = next(name for name in content if name.endswith(twice))
            archive.writestr(name.upper() if upper else name, b"")


def test_records_that_share_their_bytes_are_refused(tmp_path):
    """Each would have to be compared with its CRC-32: a small file would take hours."""
    torch.save({"a": torch.arange(6.0).view(2, 3).t()}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as archive, zipfile.ZipFile(tmp_path / "file.bin", "w") as target:
        for name in archive.namelist():
            target.writestr(name, archive.read(name))
        target.writestr("x/data/1", bytes(10_000))
        for number in range(9):
            twin = copy_of(target.getinfo("x/data/1"))
            twin.filename = f"x/data/twin{number}"
            target.filelist.append(twin)
    with pytest.raises(ValueError, match=r"file\.bin: .*its records have more bytes than the file"):
        open_torch_file(tmp_path / "file.bin")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def changed_structure(path: Path, content: object, change: Callable[[bytes], bytes]) -> None:
    """A file of torch.save whose structure is changed."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)


def after_tensors(state: bytes) -> Callable[[bytes], bytes]:
    """A structure in which BUILD hands every tensor that state."""

    def change(data: bytes) -> bytes:
        places = [place for code, _, place in pickletools.genops(data) if code.name == "REDUCE"][1::2]
        for place in reversed(places):
            data = data[: place + 1] + state + data[place + 1 :]
        return data

    return change


@pytest.mark.parametrize(
    "change",
    [
        after_tensors(b"}" + text("offset") + text("evil") + b"sb"),
        after_tensors(b"}(" + text("offset") + b"K\x00" + text("record") + b"Nub"),
        after_tensors(b"}" + text("shape") + text("evil") + b"sb"),
        lambda data: data.replace(b"K\x03K\x03\x86", (b"\x8a\x05" + (2**32).to_bytes(5, "little")) * 2 + b"\x86"),
        lambda data: data.replace(b"QK\x00", b"QG" + bytes(8)),
        lambda data: data.replace(b"QK\x00", b"QJ\xff\xff\xff\xff"),
    ],
    ids=["offset is text", "offset, no CRC-32", "shape is text", "2**64 values", "begins at 0.0", "begins before it"],
)
def test_a_structure_cannot_move_a_tensor(tmp_path, change):
    """What is compared with the file holds: no other bytes are read as its values."""
    changed_structure(tmp_path / "projector", {name: torch.ones(3, 3) for name in NAMES}, change)
    with pytest.raises(ValueError, match="projector: not a file of tensors and plain values") as error:
        read_mm_projector(tmp_path / "projector")
    assert "\n" not in str(error.value)


def test_attributes_of_a_dict_are_left_out(tmp_path):
    """torch saves a module's with `_metadata`; one of another name would hide a method."""
    state = OrderedDict({name: torch.ones(3) for name in NAMES})
    state._metadata = {"": {"version": 1}}
    changed_structure(tmp_path / "projector", state, lambda data: data.replace(text("_metadata"), text("items")))
    assert len(read_mm_projector(tmp_path / "projector")) == 4


def test_a_parameter_is_a_tensor(tmp_path):
    """Else a structure could change what it names: the function that makes parameters gives what it is given."""
    (tmp_path / "file.pt").write_bytes(saved(torch.nn.Parameter(torch.ones(2))))
    assert open_torch_file(tmp_path / "file.pt").shape == (2,)
    named = b"ctorch._utils\n_rebuild_parameter\n(cdatetime\ndate\nI01\nNtR"
    rewritten(tmp_path / "file.pt", data_pkl=b"\x80\x02" + named + b"}" + text("append") + b"K\x05sb.")
    with pytest.raises(ValueError, match="not a file of tensors"):
        open_torch_file(tmp_path / "file.pt", skip=True)
    assert callable(Skipped.append)


def test_a_file_of_torch_before_1_6_is_looked_through(tmp_path):
    """It is no archive but five pickles, and the tensors' bytes."""
    path = tmp_path / "file.bin"
    torch.save({"a": torch.arange(6.0)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(open_torch_file(path)["a"], torch.arange(6.0))
    content = path.read_bytes()
    begin = 0
    for _ in range(3):
        begin = opcodes.check(content, position=begin)
    path.write_bytes(content[:begin] + DEEP_KEY + content[opcodes.check(content, position=begin) :])
    with pytest.raises(ValueError, match=r"file\.bin: .*its structure nests tuples deeper than 100"):
        open_torch_file(path)


HUGE_MEMO = b"\x80\x02}r\xff\xff\xff\x7f."
HUGE_MEMO_TEXT = b"\x80\x02}p99999999999\n."
DEEP_KEY = b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "is compressed, which torch.save never does"),
        ({"compression": zipfile.ZIP_DEFLATED, "data_pkl": bytes(50 * 1024**2)}, "is compressed"),
        ({"twice": "data/0"}, "two records of one name"),
        ({"twice": "data.pkl", "upper": True}, "two records of one name"),
        ({"data_pkl": HUGE_MEMO}, "a memo index of 2,147,483,647"),
        ({"data_pkl": HUGE_MEMO_TEXT}, "a memo index of 99,999,999,999"),
        ({"data_pkl": DEEP_KEY}, "nests tuples deeper than 100"),
        ({"data_pkl": bytes(9 * 1024**2)}, "has 9,437,184 bytes; expected at most 8,388,608"),
        ({"data_pkl": b"\x80\x02)q"}, "is damaged"),
    ],
)
@pytest.mark.parametrize("load", [open_torch_file, load_tensors])
def test_what_takes_memory_out_of_proportion_is_not_read(tmp_path, options, message, load):
    rewritten(tmp_path / "file.pt", **options)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "file.pt")
    assert str(tmp_path / "file.pt") in str(error.value)
    assert "\n" not in str(error.value)


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def opened(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with one_line(path):
        found = open_torch_file(path, skip=True)
        if isinstance(found, dict):
            views = {
                str(name): stored_view(path, str(name), it) for name, it in found.items() if isinstance(it, Stored)
            }
            read(views)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "file.pt"


@examples
@given(damaged(saved({"a": torch.arange(6.0).view(2, 3), "b": {"c": torch.zeros(3)}, "iteration": 5})))
def test_whatever_bytes_a_file_holds(place, content):
    opened(place, content)


@examples
@given(damaged(pickle.dumps({"a": [(1, 2.5), OrderedDict(b=None)], ("c",): {"d": "e"}}, protocol=2)))
def test_whatever_a_structure_says(place, content):
    rewritten(place, data_pkl=content)
    opened(place, place.read_bytes())
