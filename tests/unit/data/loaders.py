"""Builds loaders, and takes and compares what they give."""

from __future__ import annotations

from itertools import chain, islice

import torch

from megatron_patch.data import position
from megatron_patch.data.loader import resumed_loader, train_loader
from tests.unit.data.samples import settings

COUNT = 60  # 6 samples in each of 10 shards: 54 to train on, 6 to validate


def build(model, dataset, make=train_loader, rank=0, world_size=1, **changed):
    options = {"num_workers": 0, "micro_batch_size": 2, "shuffle_buffer_size": 10, **changed}
    return make(settings(model[0], dataset, **options), model[1], rank=rank, world_size=world_size)


def resume(model, dataset, *positions, **changed):
    """A loader that goes on from where each rank was."""

    def make(config, llava, **rank):
        return resumed_loader(config, llava, lambda rank: position.load(positions[rank]), **rank)

    return build(model, dataset, make, **changed)


def take(loader, count):
    return list(islice(iter(loader), count))


def keys(batches):
    return [batch.keys for batch in batches]


def flat(batches):
    return list(chain.from_iterable(keys(batches)))


def assert_same(batches, others):
    assert keys(batches) == keys(others)
    for one, other in zip(batches, others, strict=True):
        for name in ("input_ids", "labels", "pixels"):
            assert torch.equal(getattr(one, name), getattr(other, name))
