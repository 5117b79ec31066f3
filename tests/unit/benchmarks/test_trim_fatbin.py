"""A CUDA library keeps one GPU's machine code, and its form."""

from __future__ import annotations

import struct

import pytest

PTX, CODE = 1, 2


def entry(kind: int, sm: int, payload: bytes, header: int = 64) -> bytes:
    head = struct.pack("<HHIQ", kind, 257, header, len(payload)) + bytes(12) + struct.pack("<I", sm)
    return head.ljust(header, b"\x80") + payload


def fat_binary(*entries: bytes) -> bytes:
    body = b"".join(entries)
    data = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
    return data + b"\0" * (-len(data) % 8)


def library(section: bytes, name: bytes = b".nv_fatbin") -> bytearray:
    """A 64-bit ELF of three sections: none, names, `section`."""
    names = b"\0.shstrtab\0" + name + b"\0"
    names_at, section_at = 64, 64 + -(-len(names) // 8) * 8
    table_at = section_at + -(-len(section) // 8) * 8
    head = b"\x7fELF\x02\x01\x01".ljust(40, b"\0") + struct.pack("<Q", table_at)
    head = head.ljust(58, b"\0") + struct.pack("<HHH", 64, 3, 1)
    headers = bytes(64)
    for label, offset, size in ((1, names_at, len(names)), (11, section_at, len(section))):
        headers += struct.pack("<I20xQQ", label, offset, size).ljust(64, b"\0")
    return bytearray((head + names).ljust(section_at, b"\0") + section.ljust(table_at - section_at, b"\0") + headers)


def test_other_payloads_are_blank_and_all_else_stays():
    from trim_fatbin import trim

    kept, other, ptx = b"ninety" * 7, b"eighty" * 5, b"ptx text"
    entries = [entry(PTX, 90, ptx), entry(CODE, 80, other), entry(CODE, 90, kept, header=104)]
    before = library(fat_binary(*entries) + fat_binary(entry(CODE, 90, b"more"), entry(CODE, 100, other)))
    after = bytearray(before)
    assert trim(after, 90) == (len(kept) + 4, len(ptx) + 2 * len(other))
    assert after == before.replace(other, bytes(len(other))).replace(ptx, bytes(len(ptx)))
    assert len(after) == len(before)
    assert kept in after


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bytearray(b"#!/bin/sh"), "not a 64-bit"),
        (library(b"12345678", name=b".text"), r"no section \.nv_fatbin"),
        (library(fat_binary(entry(CODE, 80, b"other"))), "no machine code for sm_90"),
        (library(b"otherwise"), "no fat binary at byte"),
    ],
)
def test_what_cannot_be_trimmed_is_an_error(data, said):
    from trim_fatbin import trim

    with pytest.raises(ValueError, match=said):
        trim(data, 90)


def test_command(tmp_path, monkeypatch, capsys):
    import trim_fatbin

    (tmp_path / "in.so").write_bytes(library(fat_binary(entry(CODE, 90, b"kept"))))
    monkeypatch.setattr("sys.argv", ["trim_fatbin.py", str(tmp_path / "in.so"), str(tmp_path / "out.so")])
    assert trim_fatbin.main() == 0
    assert (tmp_path / "out.so").read_bytes() == (tmp_path / "in.so").read_bytes()
    monkeypatch.setattr("sys.argv", [*trim_fatbin.sys.argv, "--sm", "80"])
    assert trim_fatbin.main() == 1
    assert "sm_80" in capsys.readouterr().err
