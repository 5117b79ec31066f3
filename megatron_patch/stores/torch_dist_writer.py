"""megatron.core's distributed checkpoints (format torch_dist), written without processes and without megatron.core.

The keys, shapes and blocks are those of the model's own `sharded_state_dict()`: layers stacked along a leading axis, a
block for each, norms under Transformer Engine's names. So dist_checkpointing.load shards them for any parallel sizes.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_patch.families.layout import runs
from megatron_patch.families.table import Weight
from megatron_patch.files.names import COMMON
from megatron_patch.stores import manifest
from megatron_patch.stores.torch_dist import stored_key
from megatron_patch.tensor_io import disk
from megatron_patch.tensor_io.disk import OutputFile, blocks
from megatron_patch.tensor_io.stream import Target, copy
from megatron_patch.tensor_io.torch_zip import TorchArchive
from megatron_patch.tensor_io.view import View

DATA = "__0_0.distcp"  # rank 0's first file
METADATA = ".metadata"
FORMAT = "metadata.json"  # by which megatron.core tells the format
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

# The weight's module -> modules with an `_extra_state`, in megatron.core's local layers or in Transformer Engine's. A
# model that loads asks for all of its own; one beyond these does no harm.
EXTRA_STATES = {
    "linear_qkv": ("linear_qkv", "core_attention"),
    **{name: (name,) for name in ("linear_proj", "linear_fc1", "linear_fc2", "final_layernorm", "ln_pre")},
}


@dataclass(frozen=True)
class StoredBlock:
    """A tensor of the model and its place in the stored one."""

    name: str
    weight: Weight
    view: View
    key: str
    layer: int | None
    """Its index along the stored tensor's leading axis; None: it is the whole of it."""

    @property
    def sizes(self) -> torch.Size:
        """Shape, with the axis of layers where there is one."""
        return torch.Size(self.view.shape if self.layer is None else (1, *self.view.shape))

    @property
    def offsets(self) -> torch.Size:
        """Where in the stored tensor it begins."""
        return torch.Size((self.layer or 0, *(0 for _ in self.sizes[1:])))


def write_torch_dist(
    folder: Path,
    planned: Mapping[str, tuple[Weight, View]],
    common: dict[str, Any],
    source: Sequence[dict[str, Any]] = (),
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Write a whole model into the new folder `folder`, reading each source once, and then the manifest.

    `planned`: every tensor under the local spec's name with its row of the table, the vocabulary padded. `common`:
    plain values. `source`, `progress`, errors: as `mp_rank.write_ranks`.
    """
    folder.mkdir()
    found = [StoredBlock(name, weight, view, *stored_key(name)) for name, (weight, view) in planned.items()]
    nothing = io.BytesIO()
    torch.save([None], nothing)  # what every `_extra_state` is, in a list as megatron.core has it: one for all of them
    with closing(OutputFile(folder / DATA)) as file:
        archives: list[TorchArchive] = []
        end = len(nothing.getvalue())
        for block in found:
            content = torch.empty(block.sizes, dtype=block.view.dtype, device="meta")
            archives.append(TorchArchive(file, content, blocks(end)))
            end = archives[-1].start + archives[-1].size
        file.resize(end)
        targets = [
            Target(f"{file.path}: {b.name}", b.view, file, archive.offsets[0], runs(b.weight, b.view.rows), True)
            for b, archive in zip(found, archives, strict=True)
        ]
        copy(targets, progress)
        disk.reached("weights written")
        file.write(0, nothing.getvalue())
        for target, archive in zip(targets, archives, strict=True):
            archive.finish([target.crc])
        file.sync()
    disk.reached("file finished")
    (folder / METADATA).write_bytes(pickle.dumps(_metadata(found, archives, len(nothing.getvalue()))))
    torch.save(common, folder / COMMON)
    (folder / FORMAT).write_text(json.dumps(BACKENDS))
    tensors = {b.name: manifest.tensor_record(target, b.name) for b, target in zip(found, targets, strict=True)}
    records = {name: manifest.file_record(folder, name) for name in (METADATA, COMMON, FORMAT)}
    records[DATA] = manifest.file_record(folder, DATA, targets, tensors)
    manifest.write(folder, records, {}, source)
    disk.reached("manifest written")


def _metadata(found: Sequence[StoredBlock], archives: Sequence[TorchArchive], nothing_size: int) -> Metadata:
    """What lies where, as torch.distributed.checkpoint reads it."""
    layers = Counter(block.key for block in found)
    tensors: dict[str, TensorStorageMetadata] = {}
    others: dict[str, BytesStorageMetadata] = {}
    places = {}
    for block, archive in zip(found, archives, strict=True):
        shape = block.sizes if block.layer is None else torch.Size((layers[block.key], *block.view.shape))
        entry = TensorStorageMetadata(TensorProperties(dtype=block.view.dtype), shape, [])
        entry = tensors.setdefault(block.key, entry)
        entry.chunks.append(ChunkStorageMetadata(block.offsets, block.sizes))
        places[MetadataIndex(block.key, block.offsets)] = _StorageInfo(DATA, archive.start, archive.size)
    for key in dict.fromkeys(key for block in found for key in _extra_states(block, layers[block.key])):
        others[key] = BytesStorageMetadata()
        places[MetadataIndex(key)] = _StorageInfo(DATA, 0, nothing_size)
    return Metadata({**tensors, **others}, storage_data=places, storage_meta=StorageMeta())


def _extra_states(block: StoredBlock, num_layers: int) -> Iterator[str]:
    """Keys of the `_extra_state` that go with a block's module, as megatron.core's ShardedObject spells them."""
    path, _, parameter = block.key.rpartition(".")
    parent, _, module = path.rpartition(".")
    count = 1 if block.layer is None else num_layers
    for name in EXTRA_STATES.get(module, ()) if parameter == "weight" else ():
        yield f"{parent}.{name}._extra_state/shard_{block.layer or 0}_{count}"
