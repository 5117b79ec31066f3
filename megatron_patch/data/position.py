"""A place in the data as a file: energon's states and what they are a position in, and nothing that runs."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.energon import rng, savable_loader, state
from megatron.energon.flavors.webdataset import sample_loader

from megatron_patch.tensor_io.archives import DTYPES, Stored, Tensors, check_records, open_archive
from megatron_patch.tensor_io.opcodes import why_not_loaded
from megatron_patch.tensor_io.pickles import admitting, build

ADMITTED = {
    # What energon's loaders keep: each only holds values.
    state.__name__: {"FlexState"},
    savable_loader.__name__: {"SavableDataLoaderState", "SavableDatasetCheckpoint", "SavableDatasetState"},
    sample_loader.__name__: {"SliceState"},
    rng.__name__: {"SystemRngState"},
    "collections": {"OrderedDict"},
}


def dump(position: dict[str, Any]) -> bytes:
    """A position as a file's bytes."""
    file = io.BytesIO()
    torch.save(position, file)
    return file.getvalue()


def load(data: bytes) -> dict[str, Any]:
    """What `dump` was given. Nothing but these states and plain values is built of the bytes.

    Raises ValueError, one line, for a file that is damaged or holds anything else.
    """
    try:
        file = io.BytesIO(data)
        archive = open_archive(file, most=len(data))
        check_records(file, archive)
        tensors = Tensors(archive.records)
        position = build(archive.structure, _finder(data, tensors), tensors.storage)
    except Exception as error:  # damaged bytes make torch, zipfile and pickle raise nearly anything
        raise ValueError(f"not a position in the data ({why_not_loaded(error)})") from error
    if not (isinstance(position, dict) and isinstance(position.get("fingerprint"), dict) and "state" in position):
        raise ValueError("not a position in the data (it has no fingerprint or no state)")
    return position


def _finder(data: bytes, tensors: Tensors) -> Callable[[str, str], Any]:
    """Finds energon's states, and what stands for torch's and numpy's functions that random states are pickled with."""
    shared, admitted = bytearray(data), admitting(ADMITTED)

    def tensor(*arguments: Any) -> torch.Tensor:
        stored: Stored = tensors.tensor(*arguments)
        if 0 in stored.shape:
            return torch.empty(stored.shape, dtype=stored.dtype)
        count = math.prod(stored.shape)
        return torch.frombuffer(shared, dtype=stored.dtype, count=count, offset=stored.offset).view(stored.shape)

    known = {
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("numpy", "dtype"): _dtype,
        ("numpy", "ndarray"): "ndarray",
        ("numpy.core.multiarray", "_reconstruct"): _array,
        ("numpy._core.multiarray", "_reconstruct"): _array,
        ("_codecs", "encode"): _encode,
        **{("torch", name): dtype for name, dtype in DTYPES.items()},
    }

    def find(module: str, name: str) -> Any:
        return known[module, name] if (module, name) in known else admitted(module, name)

    return find


def _dtype(code: str, *_: object) -> np.dtype:
    """A type of its own: what follows in the pickle changes it."""
    return np.dtype(code, copy=True)


def _array(*_: object) -> np.ndarray:
    """An empty array, as numpy pickles begin one."""
    return np.ndarray((0,), np.int8)


def _encode(text: str, encoding: str) -> bytes:
    """Bytes, as protocol 2 writes them. Other encodings would let a few bytes grow to any size."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"it encodes as {encoding!r}")
    return text.encode("latin1")
