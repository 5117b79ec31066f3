"""What a pickle would do to the machine that reads it, found out before any unpickler reads it.

Python's unpickler makes a table as long as the largest memo index, whatever it is (4 GB indices: 32 GB), and the hash
of tuples that are nested a million deep overflows the stack. Neither is an exception that could be caught.
"""

from __future__ import annotations

import pickletools
import re
from typing import Any, NamedTuple

MAX_BYTES = 8 * 1024**2
"""Of a file's structure without its tensors: some hundred bytes for each."""

MAX_NESTED_TUPLES = 100

FEW_OBJECTS = 500_000
BYTES_PER_OBJECT = 6
"""A pickle may make `FEW_OBJECTS` containers and instances, and more where it has so many bytes for each of them.

What torch and megatron.core write has more than 14, and an opcode of one byte can make a set of 216 bytes.
"""


class Refused(ValueError):
    """Bytes that no library is asked to read."""


# What an opcode does to the unpickler's stack.
PUSH = 0  # a plain value
PUT = 1
MEMOIZE = 2
GET = 3
MARK = 4
POP = 5
DUPLICATE = 6
BUILD = 7
STOP = 8
DROP = 9  # from here on, as many values as it takes are gone: no other stands for them
NAME = 10  # a class or function does
MAKE = 11  # a container, or what a tuple is handed to
NEST = 12  # a tuple, or what may keep one


class Opcode(NamedTuple):
    """What the walk has to know of one."""

    action: int
    takes: int
    """Values from the stack; TO_MARK: all above the last mark."""

    makes: int
    """Containers and instances."""

    argument: int
    """Bytes of its argument, or how pickletools says where it ends."""


TO_MARK = -1
LINES = pickletools.UP_TO_NEWLINE
TWO_LINES = min(pickletools.TAKEN_FROM_ARGUMENT8U, pickletools.TAKEN_FROM_ARGUMENT4U) - 1
LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: (1, False),
    pickletools.TAKEN_FROM_ARGUMENT4: (4, True),
    pickletools.TAKEN_FROM_ARGUMENT4U: (4, False),
    pickletools.TAKEN_FROM_ARGUMENT8U: (8, False),
}
"""Where the argument begins with its length: bytes of that, and whether it has a sign."""

ACTIONS = {
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), PUT),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), GET),
    **dict.fromkeys(("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "POP_MARK"), DROP),
    **dict.fromkeys(("PROTO", "FRAME"), DROP),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"), NAME),
    **dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "INST", "OBJ"), NEST),
    "MEMOIZE": MEMOIZE,
    "POP": POP,
    "DUP": DUPLICATE,
    "MARK": MARK,
    "BUILD": BUILD,
    "STOP": STOP,
}
"""Of those that do more than take values and leave one."""

MAKING = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "LIST", "DICT", "FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX")
MAKING += ("INST", "OBJ")


def _opcode(code: pickletools.OpcodeInfo) -> Opcode:
    before = [item.name for item in code.stack_before]
    takes = TO_MARK if "mark" in before else len(before)
    action = ACTIONS.get(code.name) or (MAKE if before else PUSH)
    if action == DROP and takes > 0:
        takes -= 1  # the container stays
    argument = code.arg.n if code.arg else 0
    if code.arg and code.arg.name.endswith("_pair"):
        argument = TWO_LINES
    return Opcode(action, takes, int(code.name in MAKING), argument)


TABLE: list[Opcode | None] = [None] * 256
for _code in pickletools.opcodes:
    TABLE[ord(_code.code)] = _opcode(_code)

# What stands on the walk's stack for a value: A_NAME; else FLAT, and 1 more for each tuple that is nested in another.
A_NAME, FLAT, NONE = 0, 1, 255
A_MARK = NONE
MAX_DEPTH = FLAT + MAX_NESTED_TUPLES + 1


def check(data: bytes, what: str = "the pickle", position: int = 0) -> int:
    """Raise Refused for a pickle that takes memory or stack out of proportion, or changes what it names.

    `what`: how it is called in messages. Returns where the pickle that begins at `position` ends.
    """
    table: list[Any] = TABLE  # None, where there is no such opcode, raises TypeError below
    stack, argument = bytearray(), 0
    push, pop = stack.append, stack.pop
    memo, kept = bytearray([NONE]) * (len(data) + 1), 0
    may_make = FEW_OBJECTS + len(data) // BYTES_PER_OBJECT
    try:
        while True:
            action, takes, makes, form = table[data[position]]
            position += 1
            if form:
                argument, position = _argument(data, position, form)
            if makes:
                may_make -= 1
                if may_make < 0:
                    raise Refused(f"{what} makes more objects than {len(data):,} bytes describe")
            if action == PUSH:
                push(FLAT)
            elif action >= DROP:
                begin = stack.rindex(A_MARK) if takes < 0 else len(stack) - takes
                if action == DROP:
                    del stack[begin:]
                    continue
                if takes == 1:
                    depth = stack[-1]
                else:
                    taken = stack[begin + 1 :] if takes < 0 else stack[begin:]
                    depth = max(taken) if taken else FLAT
                depth += action == NEST
                if depth >= MAX_DEPTH:
                    raise _too_deep(depth, what)
                del stack[begin:]
                push(A_NAME if action == NAME else depth)
            elif action == GET:
                if memo[argument] == NONE:
                    raise ValueError("never kept")
                push(memo[argument])
            elif action <= MEMOIZE:
                index = argument if action == PUT else kept
                if not 0 <= index <= len(data):
                    raise Refused(f"{what} has a memo index of {index:,}, and no more than {len(data):,} bytes")
                kept += memo[index] == NONE
                memo[index] = stack[-1]
            elif action == MARK:
                push(A_MARK)
            elif action == DUPLICATE:
                push(stack[-1])
            elif action == STOP:
                return position
            elif pop() is not None and action == BUILD and stack[-1] == A_NAME:
                raise Refused(f"{what} changes a class or a function")
    except Refused:
        raise
    except (IndexError, TypeError, ValueError):
        raise Refused(f"{what} is damaged (at byte {position:,})") from None


def _too_deep(depth: int, what: str) -> ValueError:
    if depth >= A_MARK:
        return ValueError("its stack runs empty")
    return Refused(f"{what} nests tuples deeper than {MAX_NESTED_TUPLES}")


def _argument(data: bytes, position: int, form: int) -> tuple[int, int]:
    """An opcode's argument, where it is a number, and where it ends."""
    value = 0
    if form > 0:
        end = position + form
        value = int.from_bytes(data[position:end], "little")
    elif form == LINES:
        end = data.index(b"\n", position) + 1
        if data[position - 1] in b"pg":
            value = int(data[position:end])
    elif form == TWO_LINES:
        end = data.index(b"\n", data.index(b"\n", position) + 1) + 1
    else:
        width, is_signed = LENGTHS[form]
        length = int.from_bytes(data[position : position + width], "little", signed=is_signed)
        if length < 0:
            raise ValueError("negative length")
        end = position + width + length
    if end > len(data):
        raise ValueError("cut off")
    return value, end


def why_not_loaded(error: BaseException) -> str:
    """What torch.load(weights_only=True) says of a file, on one line and without its advice to trust it."""
    named = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
    if named:
        return f"it names {named[1]}, which could run code"
    text = str(error).rpartition("WeightsUnpickler error: ")[2]  # all of it, where that is not in it
    text = re.sub("\x1b\\[[0-9;]*m", "", text).strip()
    return (text.splitlines() or [type(error).__name__])[0][:200]
