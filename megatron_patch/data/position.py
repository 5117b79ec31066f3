"""A place in the data as a file: energon's states and what they are a position in, and nothing that runs."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import torch
from megatron.energon import rng, savable_loader, state
from megatron.energon.flavors.webdataset import sample_loader

from megatron_patch.files import why_not_loaded
from megatron_patch.pickles import admitting, check_memo, restricted

ADMITTED = {
    # What energon's loaders keep: each only holds values.
    state.__name__: {"FlexState"},
    savable_loader.__name__: {"SavableDataLoaderState", "SavableDatasetCheckpoint", "SavableDatasetState"},
    sample_loader.__name__: {"SliceState"},
    rng.__name__: {"SystemRngState"},
    # The random states of torch and numpy within.
    "torch._utils": {"_rebuild_tensor_v2"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct"},
    "numpy._core.multiarray": {"_reconstruct"},
    "collections": {"OrderedDict"},
    "_codecs": {"encode"},  # of bytes
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
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("it is compressed, and could grow to any size")
                if entry.filename.endswith("/data.pkl"):
                    check_memo(archive.read(entry))
        # torch's own `weights_only` fills no dict of another class, as FlexState is.
        position = torch.load(
            io.BytesIO(data), map_location="cpu", weights_only=False, pickle_module=restricted(admitting(ADMITTED))
        )
    except Exception as error:  # damaged bytes make torch, zipfile and pickle raise nearly anything
        raise ValueError(f"not a position in the data ({why_not_loaded(error)})") from error
    if not (isinstance(position, dict) and isinstance(position.get("fingerprint"), dict) and "state" in position):
        raise ValueError("not a position in the data (it has no fingerprint or no state)")
    return position
