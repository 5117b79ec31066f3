"""What a pickle may name and ask for."""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import tracemalloc
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.pickles import (
    COUNTED,
    FIXED,
    LINES,
    admitting,
    check_extra_state,
    check_memo,
    unpickle,
)
from tests.canary import Canary
from tests.unit.properties import examples, in_one_line

FIND = admitting({"collections": {"OrderedDict"}})
VALUES = [OrderedDict(a=[1, 2.5, None, "\u00e9" * 300, b"x" * 300, 2**70, (4,)]), "r" * 9]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(protocol):
    find = admitting({"collections": {"OrderedDict"}, "_codecs": {"encode"}})
    assert unpickle(pickle.dumps(VALUES, protocol), find) == VALUES


def test_every_opcode_is_known():
    """But persistent ids' line, all are walked over as Python's own tool does."""
    assert {ord(code.code) for code in pickletools.opcodes} == FIXED.keys() | COUNTED.keys() | LINES.keys()


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
    with pytest.raises(pickle.UnpicklingError, match="numbers more objects than it holds"):
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


class _Storage:
    """What torch pickles a tensor's values as, with other bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple:
        return torch.storage._load_from_bytes, (self.data,)


def _tensor(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


@examples
@given(st.binary(max_size=40) | st.lists(st.sampled_from([bytes([o]) for o in (*FIXED, *COUNTED)])).map(b"".join))
def test_any_bytes_are_walked_over(data):
    with contextlib.suppress(pickle.UnpicklingError):
        check_memo(data)
    in_one_line(lambda: check_extra_state(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else None))
