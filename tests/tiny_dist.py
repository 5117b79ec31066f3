"""The `.metadata` of a small torch_dist checkpoint."""

from __future__ import annotations

import pickle

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


def metadata_bytes() -> bytes:
    """Two tensors, one in two blocks, and an object."""
    size, half = torch.Size((4, 2)), torch.Size((2, 2))
    places = [torch.Size((0, 0)), torch.Size((2, 0))]
    blocks = [ChunkStorageMetadata(place, half) for place in places]
    tensors = {
        "a.weight": TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), size, blocks),
        "b.bias": TensorStorageMetadata(
            TensorProperties(dtype=torch.float32), half, [ChunkStorageMetadata(places[0], half)]
        ),
        "c._extra_state/shard_0_1": BytesStorageMetadata(),
    }
    indices = [MetadataIndex("a.weight", places[0]), MetadataIndex("a.weight", places[1])]
    indices += [MetadataIndex("b.bias", places[0]), MetadataIndex("c._extra_state/shard_0_1")]
    storage = {index: _StorageInfo("__0_0.distcp", 900 * number, 900) for number, index in enumerate(indices)}
    return pickle.dumps(Metadata(tensors, storage_data=storage, storage_meta=StorageMeta()))
