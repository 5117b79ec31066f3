"""What a pickle would do to the machine that reads it, found out before it is read.

Python's unpickler makes a table as long as the largest memo index, whatever it is (4 GB indices: 32 GB), and the hash
of tuples that are nested a million deep overflows the stack. Neither is an exception that could be caught.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any

MAX_BYTES = 8 * 1024**2
"""Of a file's structure without its tensors: some hundred bytes for each."""

MAX_DEPTH = 100
"""Of tuples in tuples."""

PUT = ("PUT", "BINPUT", "LONG_BINPUT")
GET = ("GET", "BINGET", "LONG_BINGET")
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = -1


class Refused(ValueError):
    """A file that no library is asked to read."""


def check(data: bytes, what: str) -> None:
    """Raise Refused for a pickle that takes memory or stack out of proportion. `what`: how it is called in messages."""
    if len(data) > MAX_BYTES:
        raise Refused(f"{what} has {len(data):,} bytes; expected at most {MAX_BYTES:,} beside the tensors")
    try:
        _Walk(len(data), what).run(data)
    except Refused:
        raise
    except Exception as error:  # pickletools raises ValueError, IndexError, UnicodeError, ... for damaged bytes
        raise Refused(f"{what} is damaged ({' '.join(str(error).split())[:200] or type(error).__name__})") from None


class _Walk:
    """The unpickler's stack, with the depth of a tuple in the place of each value (0: of anything else)."""

    def __init__(self, size: int, what: str) -> None:
        self.size = size
        self.what = what
        self.stack: list[int] = []
        self.memo: dict[int, int] = {}

    def run(self, data: bytes) -> None:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            name = opcode.name
            if name in PUT or name == "MEMOIZE":
                self._put(len(self.memo) if name == "MEMOIZE" else argument)
            elif name in GET:
                self.stack.append(self.memo[argument])
            elif name in TUPLES or name == "TUPLE":
                self._tuple(self._to_mark() if name == "TUPLE" else self._take(TUPLES[name]))
            elif name == "DUP":
                self.stack.append(self.stack[-1])
            elif name == "MARK":
                self.stack.append(MARK)
            else:
                self._other(opcode)

    def _put(self, index: int) -> None:
        if not 0 <= index <= self.size:
            raise Refused(f"{self.what} has a memo index of {index:,}, and no more than {self.size:,} bytes")
        self.memo[index] = self.stack[-1]

    def _tuple(self, items: list[int]) -> None:
        depth = 1 + max(items, default=0)
        if depth > MAX_DEPTH:
            raise Refused(f"{self.what} nests tuples deeper than {MAX_DEPTH}")
        self.stack.append(depth)

    def _other(self, opcode: Any) -> None:
        before = opcode.stack_before
        names = [item.name for item in before]
        if "mark" in names:
            self._to_mark()
            self._take(names.index("mark"))
        elif opcode.name == "POP":
            self.stack.pop()
        else:
            self._take(len(before))
        self.stack += [0] * len(opcode.stack_after)

    def _take(self, count: int) -> list[int]:
        if count == 0:
            return []
        taken = self.stack[-count:]
        if len(taken) < count or MARK in taken:
            raise ValueError("its stack runs empty")
        del self.stack[-count:]
        return taken

    def _to_mark(self) -> list[int]:
        taken = []
        while (item := self.stack.pop()) != MARK:
            taken.append(item)
        return taken
