"""Layouts: inverse pairs, and what they mean, spelled out by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.families import layout, table
from megatron_patch.families.shapes import hf_shapes
from megatron_patch.families.table import Weight

DIMS = {
    "hidden": 4,
    "input": 4,
    "ffn": 8,
    "heads": 12,
    "qkv": 20,
    "groups": 2,
    "kv_channels": 2,
    "vocab": 10,
    "one": 1,
}
ROWS = {
    "qkv": table.qkv("x.linear_qkv.weight", "attention"),
    "qkv bias": table.qkv("x.linear_qkv.bias", "attention", "bias"),
    "gated": table.gated("x.linear_fc1.weight", "gate", "up"),
    "column": table.column("x.linear_fc1.weight", "fc1"),
    "row": table.row("x.linear_fc2.weight", "fc2"),
    "vocab": table.vocab("x.word_embeddings.weight", "embed"),
    "replicated": table.replicated("x.input_layernorm.weight", "norm"),
    "class_token": Weight("class_token", ("class_embedding",), layout="class_token"),
}


@pytest.fixture(params=ROWS.values(), ids=ROWS)
def row(request) -> Weight:
    return request.param.sized(DIMS)


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def test_split_is_the_inverse_of_merge(row):
    tensors = [numbered(*shape) + 1000 * i for i, shape in enumerate(hf_shapes(row))]
    whole = layout.merge(row, tensors)
    assert tuple(whole.shape) == row.shape
    for part, tensor in zip(layout.split(row, whole), tensors, strict=True):
        assert torch.equal(part, tensor)


@pytest.mark.parametrize("size", [1, 2])
def test_unshard_is_the_inverse_of_shard(row, size):
    whole = numbered(*row.shape)
    shards = layout.shard(row, whole, size)
    assert len(shards) == size
    assert torch.equal(layout.unshard(row, shards), whole)


def test_qkv_is_interleaved_per_group():
    """Two groups of three query heads, head size 2: [q q q k v] of group 0, then of group 1."""
    row = ROWS["qkv bias"].sized(DIMS)
    q, k, v = torch.arange(12), torch.arange(100, 104), torch.arange(200, 204)
    whole = layout.merge(row, [q, k, v])
    assert whole.tolist() == [0, 1, 2, 3, 4, 5, 100, 101, 200, 201, 6, 7, 8, 9, 10, 11, 102, 103, 202, 203]
    first, second = layout.shard(row, whole, 2)
    assert first.tolist() == [0, 1, 2, 3, 4, 5, 100, 101, 200, 201]
    assert second.tolist() == [6, 7, 8, 9, 10, 11, 102, 103, 202, 203]


def test_gated_shard_holds_its_part_of_both():
    row = ROWS["gated"].sized(DIMS)
    gate, up = numbered(8, 4), numbered(8, 4) + 1000
    shards = layout.shard(row, layout.merge(row, [gate, up]), 2)
    assert torch.equal(shards[1], torch.cat([gate[4:], up[4:]]))


def test_row_parallel_is_cut_along_the_input():
    row = ROWS["row"].sized(DIMS)
    whole = numbered(4, 8)
    assert torch.equal(layout.shard(row, whole, 2)[1], whole[:, 4:])


def test_vocabulary_is_padded_with_zeros():
    padded = layout.pad_vocab(numbered(10, 4), 16)
    assert torch.equal(padded[:10], numbered(10, 4))
    assert not padded[10:].any()
    assert padded.shape == (16, 4)


def test_ranks_that_disagree_on_a_replicated_tensor():
    row = ROWS["replicated"].sized(DIMS)
    with pytest.raises(ValueError, match=r"input_layernorm.weight: tensor-parallel ranks 0 and 1 hold different"):
        layout.unshard(row, [torch.zeros(4), torch.ones(4)])
