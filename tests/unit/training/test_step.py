"""The cut of a batch's text, and what a step reports."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_patch.config import Parallel
from megatron_patch.data.task_encoder import Batch
from megatron_patch.training.step import COUNTS, TimedIterator, Totals, cut_text, packed_seq_params, report_spike

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


def test_sequences_are_padded_to_what_ranks_can_share(monkeypatch):
    """TP2 with sequence parallelism and CP2: a multiple of 2 x 2 x 2, each rank has an outer and an inner part."""
    cut = Parallel(tensor_model_parallel_size=2, context_parallel_size=2)
    assert cut.sequence_multiple == 8
    for rank, places in ((0, [0, 1, 6, 7]), (1, [2, 3, 4, 5])):
        monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
        text = cut_text(batch(), IMAGE, cut)
        whole = F.pad(batch().labels, (0, 3), value=-100)
        assert torch.equal(text["labels"], whole[:, places])
        rows = torch.tensor([[-1, 0, 1, -1, -1, -1, -1, -1], [2, 3, -1, -1, -1, -1, -1, -1]])
        assert torch.equal(text["image_rows"], rows[:, places])
    assert cut_text(batch(), IMAGE, cut, multiple=16)["input_ids"].shape == (2, 64)  # fp8: 16 on each rank
    assert replace(cut, sequence_parallel=False).sequence_multiple == 4
    assert Parallel(tensor_model_parallel_size=2).sequence_multiple == 2


def test_packed_samples_are_cut_one_by_one(monkeypatch):
    """Two samples of 4 and 8 positions in one row: each rank has an outer and an inner part of both."""
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: 1)
    row = torch.arange(12)[None]
    packed = Batch(keys=["a", "b"], input_ids=row, labels=row, pixels=torch.zeros(0), segment_lengths=[4, 8])
    assert cut_text(packed, IMAGE, Parallel(context_parallel_size=2))["labels"].tolist() == [[1, 2, 6, 7, 8, 9]]
    borders = packed_seq_params(packed, torch.device("cpu"))
    assert borders.cu_seqlens_q.tolist() == [0, 4, 12]
    assert borders.max_seqlen_q == 8


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
    assert batches.seconds >= 0.1


@pytest.mark.parametrize("loss", [19.9, 20.1])
def test_a_spike_names_the_samples_of_its_highest_micro_batch(caplog, monkeypatch, loss):
    monkeypatch.setattr(logging.getLogger("megatron_patch"), "propagate", True)
    reports = [{"totals": torch.tensor([total, 4.0, 2, 9])} for total in (8.0, 200.0)]
    report_spike(loss, [1.9, 2.0, 50.0], [["a", "b"], ["c", "d"]], reports)
    said = ["loss 20.1000 is more than 10 times the usual one: 50.0000 in samples c, d"]
    assert caplog.messages == (said if loss > 20 else [])
