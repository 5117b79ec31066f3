"""What a pickle would do to the machine, found out by a walk over its opcodes."""

from __future__ import annotations

import pickle
import pickletools
import time
from collections import OrderedDict

import pytest

from megatron_patch.tensor_io.opcodes import MAX_BYTES, MAX_NESTED_TUPLES, TABLE, Refused, check

DEEP = b"\x85" * 1_000_000
NAMED = b"ccollections\nOrderedDict\n"
VALUES = [OrderedDict(a=[1, 2.5, None, "\u00e9" * 300, b"x" * 300, 2**70, (4,), {5}, frozenset([6])]), "r" * 9, True]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_ends_where_python_does(protocol):
    """Whatever follows is not looked at."""
    data = pickle.dumps(VALUES, protocol)
    assert check(data + b"r\xff\xff\xff\xff") == len(data)
    assert check(data + data, position=len(data)) == 2 * len(data)


def test_every_opcode_is_known():
    assert {ord(code.code) for code in pickletools.opcodes} == {code for code, it in enumerate(TABLE) if it}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02})" + DEEP + b"K\x01s.", "nests tuples deeper than 100"),
        (b"\x80\x02})" + b"(N" * 101 + b"t" * 101 + b"K\x01s.", "nests tuples deeper than 100"),
        (b"\x80\x02})" + (b"\x85" * 99 + b"Nb") * 2 + b"K\x01s.", "nests tuples deeper than 100"),
        (b"\x80\x02)" + b"\x85" * 100 + b"q\x00h\x00\x85.", "nests tuples deeper than 100"),
        (b"\x80\x02" + NAMED + b")" + b"\x85" * 60 + b"R" + b"\x85" * 60 + b".", "nests tuples deeper than 100"),
        (b"\x80\x02" + NAMED + b")" + b"\x85" * 60 + b"\x81" + b"\x85" * 60 + b".", "nests tuples deeper than 100"),
        (b"\x80\x02)" + b"\x85" * 60 + b"Q" + b"\x85" * 60 + b".", "nests tuples deeper than 100"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "memo index of 4,294,967,295"),
        (b"N" + b"p-1\n.", "memo index of -1"),
        (b"\x80\x02" + NAMED + b"}b.", "changes a class or a function"),
        (b"\x80\x02" + NAMED + b"q\x00h\x002}b.", "changes a class or a function"),
        (b"\x8f" * 700_000 + b".", "makes more objects than 700,001 bytes describe"),
        (b"", "is damaged"),
        (b"N", "is damaged"),
        (b"\x80\x02X\xff\xff\xff\xffa.", "is damaged"),
        (b"T\xff\xff\xff\xffN.", "is damaged"),
        (b"cposix\n.", "is damaged"),
        (b"h\x05.", "is damaged"),
        (b"(\x85.", "is damaged"),
        (b"\xff.", "is damaged"),
    ],
)
def test_what_no_unpickler_may_read(data, message):
    with pytest.raises(Refused, match=f"^it .*{message}"):
        check(data, "it")


@pytest.mark.parametrize("code", [b"N", b"\x94", b"(t"])
def test_a_long_pickle_is_walked_over_in_little_time(code):
    """An eighth of the longest that is read, in an eighth of ten seconds."""
    data = b"N" + code * (MAX_BYTES // 8 // len(code)) + b"."
    before = time.process_time()
    check(data)
    assert time.process_time() - before < 1.25


def test_nested_values_that_are_no_tuples_may_be_deep():
    value: object = 1
    for _ in range(MAX_NESTED_TUPLES + 50):
        value = [{"a": value}]
    for protocol in (0, 2, 4):
        check(pickle.dumps(value, protocol))
