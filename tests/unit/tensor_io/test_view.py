"""Views do to plans what torch does to tensors."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.families import layout, table
from megatron_patch.families.shapes import hf_shapes
from megatron_patch.families.table import Weight
from megatron_patch.tensor_io.stream import read
from megatron_patch.tensor_io.view import View

DIMS = {"hidden": 4, "input": 4, "ffn": 8, "heads": 12, "qkv": 20, "groups": 2, "kv_channels": 2, "vocab": 10, "one": 1}
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


def tensor(view: View) -> torch.Tensor:
    return read({"x": view})["x"]


def view(tensor: torch.Tensor) -> View:
    return View.of_tensor(tensor, "made here")


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.arange(30.0).reshape(5, 6)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.narrow(0, 1, 3),
        lambda t: t.narrow(1, 2, 3),
        lambda t: t.narrow(1, 2, 3).narrow(0, 4, 1),
        lambda t: t.narrow(0, 2, 0),
        lambda t: type(t).cat([t, t.narrow(0, 3, 2)], 0),
        lambda t: type(t).cat([t.narrow(1, 4, 2), t, t.narrow(1, 0, 1)], 1),
        lambda t: type(t).cat([type(t).cat([t, t], 0), t.new_zeros(10, 2)], 1),
        lambda t: type(t).cat([type(t).cat([t.narrow(0, 0, 2), t], 0), type(t).cat([t, t.narrow(0, 1, 2)], 0)], 1),
        lambda t: type(t).cat([t, t.new_zeros(2, 6)], 0).narrow(0, 4, 3),
        lambda t: t.reshape(2, 15),
        lambda t: t.reshape(-1),
        lambda t: t.reshape(5, 2, 3).narrow(0, 1, 2),
        lambda t: t.to(torch.bfloat16),
    ],
)
def test_views_do_as_torch(monkeypatch, matrix, change):
    monkeypatch.setattr(torch.Tensor, "cat", staticmethod(torch.cat), raising=False)
    expected, planned = change(matrix), change(view(matrix))
    assert planned.shape == tuple(expected.shape)
    assert planned.dtype == expected.dtype
    assert torch.equal(tensor(planned), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.narrow(0, 3, 3), r"cannot take 3 from 3 on along axis 0 of shape \[5, 6\]"),
        (lambda v: v.reshape(5, 2, 3).narrow(1, 0, 1), "along axis 1"),
        (lambda v: View.cat([v, v.to(torch.float16)]), "types torch.float32, torch.float16"),
        (lambda v: View.cat([v, v.narrow(1, 0, 2)]), r"shapes \[5, 6\], \[5, 2\]"),
        (lambda v: v.reshape(7, 7), "cannot reshape"),
        (lambda v: v.narrow(0, 0, 4).reshape(2, 12), "it is not one stored tensor"),
    ],
)
def test_what_a_view_cannot(matrix, change, message):
    with pytest.raises(ValueError, match=message):
        change(view(matrix))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("size", [1, 2])
def test_layouts_plan_what_they_compute(row, size):
    """Every layout function gives the same of views as of tensors."""
    row = row.sized(DIMS)
    parts = [torch.randn(shape) for shape in hf_shapes(row)]
    whole, planned = layout.merge(row, parts), layout.merge(row, [view(part) for part in parts])
    assert torch.equal(tensor(planned), whole)
    shards, planned_shards = layout.shard(row, whole, size), layout.shard(row, planned, size)
    for shard, planned_shard in zip(shards, planned_shards, strict=True):
        assert torch.equal(tensor(planned_shard), shard)
    joined = layout.unshard(row, planned_shards)
    assert torch.equal(tensor(joined), whole)
    stored = view(whole)
    for part, planned_part in zip(parts, layout.split(row, stored), strict=True):
        assert torch.equal(tensor(planned_part), part)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_runs_and_ranges_cover_a_shard(row):
    row = row.sized(DIMS)
    whole = torch.arange(torch.Size(row.shape).numel()).reshape(row.shape)
    for rank, shard in enumerate(layout.shard(row, whole, 2)):
        assert sum(layout.runs(row, shard.shape[0])) == shard.shape[0]
        if row.axis is not None:
            parts = [
                whole.narrow(row.axis, start, end - start)
                for start, end in layout.ranges(row, row.shape[row.axis], rank, 2)
            ]
            assert torch.equal(torch.cat(parts, row.axis), shard)


def test_runs_of_rows_that_come_from_one_tensor():
    """Two groups of three query heads, head size 2; gate above up."""
    assert layout.runs(ROWS["qkv"].sized(DIMS), 20) == [6, 2, 2, 6, 2, 2]
    assert layout.runs(ROWS["qkv"].sized(DIMS), 10) == [6, 2, 2]
    assert layout.runs(ROWS["gated"].sized(DIMS), 8) == [4, 4]
    assert layout.runs(ROWS["column"].sized(DIMS), 8) == [8]
