"""What a rank's model takes of a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_patch.config.train import Parallel
from megatron_patch.data.task_encoder import Batch
from megatron_patch.training.batch import (
    count,
    packed_seq_params,
    pad,
    place_images,
    place_labels,
    shard_sequence,
    to_device,
)

IMAGE = 9


def batch() -> Batch:
    input_ids = torch.tensor([[1, IMAGE, IMAGE, 2, 3], [IMAGE, IMAGE, 4, 5, 6]])
    labels = torch.tensor([[-100, -100, -100, 3, 7], [-100, 4, 5, 6, -100]])
    return Batch(keys=["a", "b"], input_ids=input_ids, labels=labels, pixels=torch.zeros(2, 3, 1, 1))


def test_patches_are_counted_over_the_whole_batch():
    text = shard_sequence(batch(), IMAGE, Parallel())
    assert text["image_rows"].tolist() == [[-1, 0, 1, -1, -1], [2, 3, -1, -1, -1]]
    assert text["input_ids"].tolist() == [[1, 0, 0, 2, 3], [0, 0, 4, 5, 6]]
    assert torch.equal(text["labels"], batch().labels)


def test_sequences_are_padded_to_what_ranks_can_share(monkeypatch):
    """TP2 with sequence parallelism and CP2: a multiple of 2 x 2 x 2, each rank has an outer and an inner part."""
    cut = Parallel(tensor_model_parallel_size=2, context_parallel_size=2)
    assert cut.sequence_multiple == 8
    for rank, places in ((0, [0, 1, 6, 7]), (1, [2, 3, 4, 5])):
        monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
        text = shard_sequence(batch(), IMAGE, cut)
        whole = F.pad(batch().labels, (0, 3), value=-100)
        assert torch.equal(text["labels"], whole[:, places])
        rows = torch.tensor([[-1, 0, 1, -1, -1, -1, -1, -1], [2, 3, -1, -1, -1, -1, -1, -1]])
        assert torch.equal(text["image_rows"], rows[:, places])
    assert shard_sequence(batch(), IMAGE, cut, multiple=16)["input_ids"].shape == (2, 64)  # fp8: 16 on each rank
    assert replace(cut, sequence_parallel=False).sequence_multiple == 4
    assert Parallel(tensor_model_parallel_size=2).sequence_multiple == 2


def test_packed_samples_are_cut_one_by_one(monkeypatch):
    """Two samples of 4 and 8 positions in one row: each rank has an outer and an inner part of both."""
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: 1)
    row = torch.arange(12)[None]
    packed = Batch(keys=["a", "b"], input_ids=row, labels=row, pixels=torch.zeros(0), segment_lengths=[4, 8])
    assert shard_sequence(packed, IMAGE, Parallel(context_parallel_size=2))["labels"].tolist() == [[1, 2, 6, 7, 8, 9]]
    borders = packed_seq_params(packed.segment_lengths)
    assert borders.cu_seqlens_q.tolist() == [0, 4, 12]
    assert borders.max_seqlen_q == 8


def test_positions_count_as_hidden_states_lie():
    """[s, b]: position s of sample b is 2 s + b. Patches in their order, labels in the order of positions."""
    text = shard_sequence(batch(), IMAGE, Parallel())
    assert place_images(text, Parallel())["image_positions"].tolist() == [2, 4, 1, 3]
    labels = place_labels(text)
    assert labels["wanted"].tolist() == [3, 5, 6, 7, 8]
    assert labels["labels"].tolist() == [4, 5, 3, 6, 7]


def test_a_context_parallel_rank_says_which_patches_it_has(monkeypatch):
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: 1)
    cut = Parallel(context_parallel_size=2)
    text = shard_sequence(batch(), IMAGE, cut)  # positions 2 to 5 of 8
    placed = place_images(text, cut)
    assert placed["image_positions"].tolist() == [0]
    assert placed["image_rows"].tolist() == [1]


def test_one_buffer_goes_to_the_device():
    given = {
        "one": torch.tensor([[1, 2], [3, 4]]),
        "two": torch.empty(0, dtype=torch.int64),
        "three": torch.tensor([5]),
    }
    moved = to_device(given, torch.device("cpu"))
    assert {name: tensor.tolist() for name, tensor in moved.items()} == {
        "one": [[1, 2], [3, 4]],
        "two": [],
        "three": [5],
    }
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved.values()}) == 1


def test_padding_is_counted_as_computed_and_belongs_to_the_last_segment(monkeypatch):
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: 0)
    counts = count(pad(batch(), 8), num_labels=5)
    assert (counts["num_positions"], counts["num_pairs"], counts["num_tokens"]) == (16, 128, 9)
    row = torch.arange(12)[None]
    packed = pad(Batch(keys=["a"], input_ids=row, labels=row, pixels=torch.zeros(0), segment_lengths=[4, 8]), 16)
    assert packed.segment_lengths == [4, 12]
    counts = count(packed, num_labels=12)
    assert (counts["num_positions"], counts["num_pairs"], counts["num_tokens"]) == (16, 160, 12)
