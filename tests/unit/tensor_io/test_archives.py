"""What a file of torch.save may hold, and what is refused before any library reads it."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from copy import copy as copy_of
from pathlib import Path

import pytest
import torch
from hypothesis import given

from megatron_patch.stores.mm_projector import NAMES, read_mm_projector
from megatron_patch.stores.reader import load_tensors, open_torch_file, stored_view
from megatron_patch.tensor_io import archives, opcodes
from megatron_patch.tensor_io.archives import Stored
from megatron_patch.tensor_io.stream import read
from megatron_patch.tensor_io.torch_zip import Skipped
from tests.unit.properties import damaged, examples, one_line


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


def test_a_large_structure_of_torch_before_1_6_is_called_so(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    torch.save({f"a{number}": torch.zeros(1) for number in range(50)}, path, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(archives, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"file\.bin: .*its structure does not end in the first 1,000 bytes"):
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
