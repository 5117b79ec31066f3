"""What a pickle may name. Every pickle and every file of torch.save is loaded here, after `opcodes` has looked at it.

A pickle can name any callable of the machine and run it. A sum beside it does not help: who can write the one can write
the other.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_patch.tensor_io import opcodes
from megatron_patch.tensor_io.archives import Archive, check_legacy, check_records, open_archive
from megatron_patch.tensor_io.opcodes import Refused, why_not_loaded

RECIPES = "transformer_engine.common.recipe"
"""Module of the settings that Transformer Engine keeps with fp8's scales."""

ARCHIVE = b"PK\x03\x04"
"""What a zip archive begins with, by which torch.load knows one."""


def unpickle(data: bytes, find: Callable[[str, str], Any]) -> Any:
    """What a pickle holds. `find`: gives what a module's name stands for, or raises UnpicklingError.

    Raises an exception of any kind for bytes that are no pickle.
    """
    opcodes.check(data)
    return build(data, find)


def build(data: bytes, find: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None = None) -> Any:
    """As `unpickle`, of a pickle that `opcodes.check` has seen. `persistent`: gives what a persistent id stands for."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return find(module, name)

        def persistent_load(self, saved: Any) -> Any:
            if persistent is None:
                raise pickle.UnpicklingError("it has persistent ids")
            return persistent(saved)

    return Unpickler(io.BytesIO(data)).load()


def load_plain(
    source: Path | str | IO[bytes], archive: Archive | None = None, mmap: bool = False, **options: Any
) -> Any:
    """torch.load of tensors and plain values, after a look at what this does to the machine.

    `archive`: what `source` is, where it was opened before. `mmap`: map the tensors of an archive into memory. Raises
    an exception of any kind for anything else or a damaged file.
    """
    with open(source, "rb") if isinstance(source, Path | str) else nullcontext(source) as file:
        file.seek(0)
        is_archive = file.read(len(ARCHIVE)) == ARCHIVE
        file.seek(0)
        if is_archive:
            archive = archive or open_archive(file)
            check_records(file, archive)
            file.seek(0)
            if torch._C.PyTorchFileReader(file).get_record("data.pkl") != archive.structure:
                raise Refused("it holds two structures (data.pkl)")
        else:
            check_legacy(file)
        file.seek(0)
        options = {"map_location": "cpu", **options, "weights_only": True}
        return torch.load(str(source), mmap=True, **options) if mmap and is_archive else torch.load(file, **options)


def admitting(names: Mapping[str, set[str]]) -> Callable[[str, str], Any]:
    """A function that finds these names of these modules, and no other."""

    def find(module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
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
            load_plain(io.BytesIO(state.getvalue()))
        elif state is not None and not isinstance(state, Tensor):
            raise pickle.UnpicklingError(f"it is a {type(state).__name__}")
    except Exception as error:  # damaged bytes make pickle raise nearly anything
        raise ValueError(f"not fp8's scales ({why_not_loaded(error)})") from error


def _scales(module: str, name: str) -> Any:
    """What Transformer Engine pickles with fp8's scales: tensors, and its recipe."""
    if (module, name) == ("builtins", "getattr"):
        return _member
    if (module, name) in SCALES:
        return SCALES[module, name]
    if module == RECIPES and module in sys.modules:
        kind = getattr(sys.modules[module], name, None)
        if isinstance(kind, type) and kind.__module__ == module:
            return kind
    raise refused(module, name)


def _load_from_bytes(data: bytes) -> Any:
    return load_plain(io.BytesIO(data))


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
