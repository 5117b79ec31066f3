"""Mock data: the sizes of the real thing, the same again from any position."""

from itertools import islice
from pathlib import Path

import torch

from megatron_patch.data.loader import resumed_loader, save_position, train_loader, valid_loader
from megatron_patch.data.position import load
from tests.unit.data.samples import describe, settings


def build(model, make=train_loader, rank=0, world_size=2, **changed):
    return make(settings(model[0], Path("mock"), **changed), model[1], rank=rank, world_size=world_size)


def test_batches_follow_from_their_number(tmp_path):
    model = tmp_path, describe(tmp_path)
    loader = build(model, micro_batch_size=3)
    batches = iter(loader)
    first = list(islice(batches, 4))
    assert len({len(batch.input_ids[0]) for batch in first}) > 1
    assert all(batch.pixels.shape == (3, 3, 28, 28) for batch in first)
    assert all((batch.input_ids == model[1].image_token_id).sum() == 3 * 16 for batch in first)
    counts = [int((labels != -100).sum()) for batch in islice(batches, 100) for labels in batch.labels]
    assert 28 < sum(counts) / len(counts) < 33
    position = save_position(loader)
    expected = next(batches)

    def resumed(config, llava, **rank):
        return resumed_loader(config, llava, lambda rank: load(position), **rank)

    for world_size in (2, 1):
        restored = next(iter(build(model, resumed, world_size=world_size, micro_batch_size=3)))
        assert restored.keys == expected.keys
        assert torch.equal(restored.input_ids, expected.input_ids)
        assert torch.equal(restored.pixels, expected.pixels)
    for other in (build(model, rank=1, micro_batch_size=3), build(model, valid_loader, micro_batch_size=3)):
        assert not torch.equal(next(iter(other)).pixels, first[0].pixels)


def test_packs_are_nearly_full(tmp_path):
    model = tmp_path, describe(tmp_path)
    for batch in islice(iter(build(model, micro_batch_size=1, packing_buffer_size=9, length=512)), 5):
        assert 440 < sum(batch.segment_lengths) <= 512
        assert len(batch.segment_lengths) == len(batch.keys) > 4
