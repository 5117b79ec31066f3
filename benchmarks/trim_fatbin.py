"""Blank out what a CUDA library holds for other GPUs than one, so that it compresses to what that one needs.

    python benchmarks/trim_fatbin.py LIBRARY OUTPUT [--sm 90]

In the ELF section .nv_fatbin lie fat binaries, one after another, at multiples of 8 bytes: a header (magic, u16
version, u16 header size, u64 size of what follows), then entries (u16 kind: 1 PTX, 2 machine code; u16 version, u32
header size, u64 payload size; at byte 28 the u32 architecture), each before its payload. Payloads of other
architectures and all PTX become zeros; headers and sizes stay, so that the driver still finds its own.
"""

from __future__ import annotations

import argparse
import struct
import sys
from pathlib import Path

MAGIC = 0xBA55ED50
MACHINE_CODE = 2
SECTION = b".nv_fatbin"


def main() -> int:
    """Trim a library; 1 when it holds nothing for the GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sm", type=int, default=90, help="architecture that stays, such as 90 for an H100 or H200")
    options = parser.parse_args()
    data = bytearray(options.library.read_bytes())
    try:
        kept, blanked = trim(data, options.sm)
    except ValueError as error:
        print(f"error: {options.library}: {error}", file=sys.stderr)
        return 1
    options.output.write_bytes(data)
    print(f"{options.output}: {kept / 1e6:.1f} MB for sm_{options.sm} kept, {blanked / 1e6:.1f} MB blanked")
    return 0


def trim(data: bytearray, sm: int) -> tuple[int, int]:
    """Blank payloads in place; returns the bytes kept and blanked. Raises ValueError where none is to be kept."""
    position, end = find_section(data, SECTION)
    kept = blanked = 0
    while position < end:
        magic, _, header, size = struct.unpack_from("<IHHQ", data, position)
        if magic != MAGIC:
            raise ValueError(f"no fat binary at byte {position} (0x{magic:08x})")
        entry, last = position + header, position + header + size
        while entry < last:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            if kind == MACHINE_CODE and architecture == sm:
                kept += size
            else:
                data[entry + header : entry + header + size] = bytes(size)
                blanked += size
            entry += header + size
        position = -(-last // 8) * 8
    if not kept:
        raise ValueError(f"holds no machine code for sm_{sm}")
    return kept, blanked


def find_section(data: bytearray, name: bytes) -> tuple[int, int]:
    """Where a section of a 64-bit little-endian ELF begins and ends. Raises ValueError when there is none."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names_index = struct.unpack_from("<HHH", data, 58)
    # Of each: offset of its name, and past type, flags and address its offset and size.
    sections = [struct.unpack_from("<I20xQQ", data, table + size * index) for index in range(count)]
    _, names, _ = sections[names_index]
    for label, offset, length in sections:
        if data[names + label : data.index(0, names + label)] == name:
            return offset, offset + length
    raise ValueError(f"has no section {name.decode()}")


if __name__ == "__main__":
    sys.exit(main())
