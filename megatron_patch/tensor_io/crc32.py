"""CRC-32 of bytes of which each piece's is known: of a file's record whose tensors pass one by one."""

from __future__ import annotations

from functools import cache

POLYNOMIAL = 0xEDB88320
ONE = 1 << 31


def combine(first: int, second: int, length: int) -> int:
    """CRC-32 of two pieces, one after the other, `length` bytes the second: zlib's crc32_combine."""
    power, bit = ONE, 3  # x ** (8 * length)
    while length:
        if length & 1:
            power = _times(_square(bit % 32), power)
        length >>= 1
        bit += 1
    return _times(power, first) ^ second


def _times(a: int, b: int) -> int:
    """Product of two polynomials over GF(2), modulo CRC-32's. Their highest bit is the coefficient of 1."""
    product, mask = 0, ONE
    while mask:
        if a & mask:
            product ^= b
        mask >>= 1
        b = (b >> 1) ^ POLYNOMIAL if b & 1 else b >> 1
    return product


@cache
def _square(count: int) -> int:
    """x, squared `count` times."""
    return 1 << 30 if count == 0 else _times(_square(count - 1), _square(count - 1))
