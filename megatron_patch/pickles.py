"""What a pickle may name, and how much memory it may ask for, before Python's unpickler builds anything of it.

A pickle can name any callable of the machine and run it. A sum beside it does not help: who can write the one can write
the other.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch import Tensor

from megatron_patch.files import why_not_loaded

RECIPES = "transformer_engine.common.recipe"
"""Module of the settings that Transformer Engine keeps with fp8's scales."""

# Opcode -> bytes of its argument, of those that have a fixed number.
FIXED = dict.fromkeys(b"(.0120NQRab]}ldseu)toi\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98", 0)
FIXED |= {
    **dict.fromkeys(b"Khq\x80\x82", 1),
    **dict.fromkeys(b"M\x83", 2),
    **dict.fromkeys(b"Jjr\x84", 4),
    **dict.fromkeys(b"G\x95", 8),
}
COUNTED = {
    **dict.fromkeys(b"UC\x8a\x8c", 1),
    **dict.fromkeys(b"TXB\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96", 8),
}
"""Opcode -> bytes of the length that precedes its argument."""
LINES = {**dict.fromkeys(b"FILSVPgp", 1), **dict.fromkeys(b"ci", 2)}
"""Opcode -> lines of text that its argument is."""
PUTS = frozenset(b"qr")


def check_memo(data: bytes) -> None:
    """Raise UnpicklingError for a pickle that numbers what it keeps beyond its own length.

    Python makes a table of so many entries and fills it: 6 bytes can ask for 64 GB.
    """
    position, end = 0, len(data)
    while position < end:
        code = data[position]
        position += 1
        if code in PUTS:
            width = FIXED[code]
            if int.from_bytes(data[position : position + width], "little") > end:
                raise pickle.UnpicklingError("it numbers more objects than it holds")
            position += width
        elif code in LINES:
            for _ in range(LINES[code]):
                line = data.find(b"\n", position)
                if line < 0:
                    return  # Python says what is wrong with it
                if code == 0x70 and len(data[position:line].strip()) > len(str(end)):
                    raise pickle.UnpicklingError("it numbers more objects than it holds")
                position = line + 1
        elif code in COUNTED:
            width = COUNTED[code]
            position += width + int.from_bytes(data[position : position + width], "little")
        elif code in FIXED:
            position += FIXED[code]
        else:
            return


def unpickle(data: bytes, find: Callable[[str, str], Any]) -> Any:
    """What a pickle holds. `find`: gives what a module's name stands for, or raises UnpicklingError.

    Raises an exception of any kind for bytes that are no pickle.
    """
    check_memo(data)
    return restricted(find).load(io.BytesIO(data))


def restricted(find: Callable[[str, str], Any]) -> SimpleNamespace:
    """What stands for the module `pickle` where names are looked up with `find` alone: torch.load's pickle_module."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return _member if (module, name) == ("builtins", "getattr") else find(module, name)

    def load(file: IO[bytes], **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(__name__="pickle", Unpickler=Unpickler, load=load)


def admitting(names: Mapping[str, set[str]]) -> Callable[[str, str], Any]:
    """A function that finds these names of these modules, and no other."""

    def find(module: str, name: str) -> Any:
        if name not in names.get(module, ()):
            raise refused(module, name)
        __import__(module)
        return getattr(sys.modules[module], name)

    return find


def refused(module: str, name: str) -> pickle.UnpicklingError:
    """What is said of a name that is not admitted."""
    return pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def check_extra_state(state: object) -> None:
    """Raise ValueError unless an extra state of Transformer Engine, which it unpickles, holds fp8's scales alone.

    `state`: uint8 [n], a pickle in a tensor; or, before 2.0, a file of torch.save; or None.
    """
    try:
        if isinstance(state, Tensor) and state.numel():
            unpickle(state.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), _scales)
        elif isinstance(state, io.BytesIO):
            torch.load(io.BytesIO(state.getvalue()), map_location="cpu", weights_only=True)
        elif state is not None and not isinstance(state, Tensor):
            raise pickle.UnpicklingError(f"it is a {type(state).__name__}")
    except Exception as error:  # damaged bytes make pickle raise nearly anything
        raise ValueError(f"not fp8's scales ({why_not_loaded(error)})") from error


def _scales(module: str, name: str) -> Any:
    """What Transformer Engine pickles with fp8's scales: tensors, and its recipe."""
    if (module, name) in SCALES:
        return SCALES[module, name]
    if module == RECIPES and module in sys.modules:
        kind = getattr(sys.modules[module], name, None)
        if isinstance(kind, type) and kind.__module__ == module:
            return kind
    raise refused(module, name)


def _load_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


SCALES = {
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("collections", "OrderedDict"): OrderedDict,
}


def _member(kind: Any, name: str) -> Enum:
    """What Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) pickle an enum's member as: getattr(its class, its name)."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"it asks for {name} of something else than an enum, which could run code")
    return kind[name]
