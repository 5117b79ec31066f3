"""The cut of a batch's text, and what a step reports."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from megatron_patch.config import Parallel
from megatron_patch.data.task_encoder import Batch
from megatron_patch.training.step import COUNTS, TimedIterator, Totals, cut_text

IMAGE = 9


def batch() -> Batch:
    input_ids = torch.tensor([[1, IMAGE, IMAGE, 2, 3], [IMAGE, IMAGE, 4, 5, 6]])
    labels = torch.tensor([[-100, -100, -100, 3, 7], [-100, 4, 5, 6, -100]])
    return Batch(keys=["a", "b"], input_ids=input_ids, labels=labels, pixels=torch.zeros(2, 3, 1, 1))


def test_patches_are_counted_over_the_whole_batch():
    text = cut_text(batch(), IMAGE, Parallel())
    assert text["image_rows"].tolist() == [[-1, 0, 1, -1, -1], [2, 3, -1, -1, -1]]
    assert torch.equal(text["input_ids"], batch().input_ids)
    assert torch.equal(text["labels"], batch().labels)


def test_sequences_are_padded_to_what_ranks_can_share():
    """TP2 with sequence parallelism and CP2: a multiple of 2 x 2 x 2."""
    cut = Parallel(tensor_model_parallel_size=2, context_parallel_size=2)
    assert cut.sequence_multiple == 8
    text = cut_text(batch(), IMAGE, cut)
    assert text["input_ids"].shape == (2, 8)
    assert (text["labels"][:, 5:] == -100).all()
    assert (text["image_rows"][:, 5:] == -1).all()
    assert replace(cut, sequence_parallel=False).sequence_multiple == 4
    assert Parallel(tensor_model_parallel_size=2).sequence_multiple == 2


def totals(loss: float, count: int) -> Totals:
    counts = dict.fromkeys(COUNTS, count)
    return Totals(loss=loss, data_seconds=count / 10, **counts)


def test_mean_of_totals_weighs_by_labels():
    mean = Totals.mean([totals(1.0, 10), totals(4.0, 30)])
    assert mean == totals(3.25, 40)
    assert mean.data_seconds == 4.0


def test_the_wait_for_batches_is_measured():
    def slow():
        for batch in "ab":
            time.sleep(0.05)
            yield batch

    batches = TimedIterator(slow())
    assert [next(batches), next(batches)] == ["a", "b"]
    assert 0.1 <= batches.seconds < 0.2
