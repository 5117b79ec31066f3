"""What a pickle may name and ask for."""

from __future__ import annotations

import contextlib
import io
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.tensor_io import opcodes
from megatron_patch.tensor_io.opcodes import TABLE, Refused
from megatron_patch.tensor_io.pickles import admitting, check_extra_state, load_plain, unpickle
from tests.canary import Canary
from tests.unit.properties import examples, in_one_line

OPCODES = [bytes([code]) for code, it in enumerate(TABLE) if it]
FIND = admitting({"collections": {"OrderedDict"}})
VALUES = [OrderedDict(a=[1, 2.5, None, "\u00e9" * 300, b"x" * 300, 2**70, (4,)]), "r" * 9]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(protocol):
    find = admitting({"collections": {"OrderedDict"}, "_codecs": {"encode"}})
    assert unpickle(pickle.dumps(VALUES, protocol), find) == VALUES


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"\x80\x02X\x03\x00\x00\x00abcr\xff\xff\xff\x7f.",
        b"\x80\x04\x8c\x01aNNNr\x00\x00\x00\x10.",
        b"Np4000000000\n.",
    ],
)
def test_a_small_pickle_makes_no_large_table(data):
    tracemalloc.start()
    with pytest.raises(Refused, match=r"a memo index of [\d,]+, and no more than"):
        unpickle(data, FIND)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000


@pytest.mark.parametrize("name", [("posix", "system"), ("collections", "OrderedDict.fromkeys"), ("os", "path.exists")])
def test_other_names_are_refused(name):
    module, attribute = (b"\x8c" + bytes([len(part)]) + part.encode() for part in name)
    with pytest.raises(pickle.UnpicklingError, match=f"names {'.'.join(name)}, which could run code"):
        unpickle(b"\x80\x04" + module + attribute + b"\x93.", FIND)


def test_extra_states(tmp_path):
    canary = tmp_path / "canary"
    inner = io.BytesIO()
    torch.save(Canary(canary), inner)
    for evil in (Canary(canary), _Storage(inner.getvalue())):
        tensor = torch.frombuffer(bytearray(pickle.dumps(evil)), dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"not fp8's scales .*(getattr|touch|pathlib)"):
            check_extra_state(tensor)
    with pytest.raises(ValueError, match=r"not fp8's scales .*(getattr|touch|pathlib)"):
        check_extra_state(io.BytesIO(inner.getvalue()))
    assert not canary.exists()
    for harmless in (None, torch.empty(0, dtype=torch.uint8), _tensor({"scale_fwd": torch.ones(2)})):
        check_extra_state(harmless)


DEEP = b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."


def test_an_extra_state_that_would_overflow_the_stack_is_refused():
    """Also where torch.load would read it: in a tensor's values, and in a file of torch.save."""
    for state in (torch.frombuffer(bytearray(DEEP), dtype=torch.uint8), io.BytesIO(DEEP), _tensor(_Storage(DEEP))):
        with pytest.raises(ValueError, match=r"not fp8's scales .*nests tuples deeper"):
            check_extra_state(state)


def test_nothing_changes_what_a_pickle_names():
    """BUILD of a class would change it for the whole process."""

    class Named:
        kept = 1

    state = b"N}X\x04\x00\x00\x00keptK\x05s\x86b."
    with pytest.raises(Refused, match="changes a class or a function"):
        unpickle(b"\x80\x02cmodule\nNamed\n" + state, lambda module, name: Named)
    assert Named.kept == 1


def archive_of(structure: bytes, compression: int = zipfile.ZIP_STORED) -> io.BytesIO:
    file, new = io.BytesIO(), io.BytesIO()
    torch.save({"a": 1}, file)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(new, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, structure if name.endswith("/data.pkl") else source.read(name))
    return new


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (archive_of(DEEP), "nests tuples deeper"),
        (io.BytesIO(DEEP), "nests tuples deeper"),
        (archive_of(pickle.dumps("a" * 10**6), zipfile.ZIP_DEFLATED), "is compressed"),
    ],
)
def test_a_file_is_looked_through_before_torch_loads_it(tmp_path, file, message):
    (tmp_path / "file.pt").write_bytes(file.getvalue())
    for source in (file, tmp_path / "file.pt", str(tmp_path / "file.pt")):
        with pytest.raises(Refused, match=message):
            load_plain(source)


def test_a_file_in_which_torch_finds_another_structure_is_refused(tmp_path):
    """zipfile takes a file with bytes before the archive, and torch counts from the file's beginning."""
    first, second = archive_of(DEEP).getvalue(), archive_of(pickle.dumps(1, 2)).getvalue()
    with pytest.raises(Exception, match=r"two structures|PytorchStreamReader|nests tuples"):
        load_plain(io.BytesIO(first + second))


class _Storage:
    """What torch pickles a tensor's values as, with other bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple:
        return torch.storage._load_from_bytes, (self.data,)


def _tensor(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


@examples
@given(st.binary(max_size=40) | st.lists(st.sampled_from(OPCODES)).map(b"".join))
def test_any_bytes_are_walked_over(data):
    with contextlib.suppress(Refused):
        opcodes.check(data)
    in_one_line(lambda: check_extra_state(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else None))
