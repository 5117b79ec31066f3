"""Loaders on a real energon dataset: order, exact positions, and what is not read."""

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from itertools import islice

import pytest
import torch

from megatron_patch.config.train import Parallel
from megatron_patch.data import loader as loader_module
from megatron_patch.data.loader import batches_ahead, save_position, valid_loader
from tests.unit.data.loaders import COUNT, assert_same, build, flat, keys, resume, take
from tests.unit.data.samples import convert_folder, settings, write_annotations, write_pretrain


@pytest.mark.parametrize("num_workers", [0, 2])
def test_restored_loader_goes_on_exactly(num_workers, model, dataset):
    """Over the end of an epoch too, and with samples waiting in the shuffle buffer."""
    loader = build(model, dataset, num_workers=num_workers)
    batches = iter(loader)
    for count in (3, 24):
        for _ in range(count):
            next(batches)
        position = save_position(loader)
        assert isinstance(position, bytes)
        expected = list(islice(batches, 15))
        again = resume(model, dataset, position, num_workers=num_workers)
        assert_same(take(again, 15), expected)


def test_reading_far_ahead_changes_no_position(model, dataset, monkeypatch):
    monkeypatch.setattr(loader_module, "batches_ahead", lambda *arguments: 12)
    loader = build(model, dataset, num_workers=2)
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    time.sleep(1)  # until all that is allowed was read
    position = save_position(loader)
    assert_same(take(resume(model, dataset, position, num_workers=2), 30), list(islice(batches, 30)))


def test_an_iteration_of_stages_is_read_ahead(model, dataset, monkeypatch):
    config = settings(model[0], dataset, micro_batch_size=2, global_batch_size=64)
    stages = replace(config, parallel=Parallel(pipeline_model_parallel_size=2))
    assert batches_ahead(stages, 2, 3) == 2, "not into shared memory"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a mock
    assert batches_ahead(stages, 2, 3) == 6
    assert batches_ahead(config, 2, 3) == 2


def test_position_before_the_first_batch(model, dataset):
    loader = build(model, dataset, num_workers=1)
    again = resume(model, dataset, save_position(loader), num_workers=1)
    # And where a restored one is, before it went on.
    third = resume(model, dataset, save_position(again), num_workers=1)
    expected = take(loader, 3)
    assert_same(take(again, 3), expected)
    assert_same(take(third, 3), expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_equal_ranks_see_the_same_and_others_something_else(num_workers, model, dataset):
    """Tensor-parallel ranks each build their own loader."""
    first, second, again = (
        take(build(model, dataset, rank=rank, world_size=2, num_workers=num_workers), 5) for rank in (0, 1, 0)
    )
    assert_same(first, again)
    assert not {*flat(first)} & {*flat(second)}
    assert flat(first) != sorted(flat(first))


def test_ranks_share_an_epoch(model, dataset):
    options = {"world_size": 2, "micro_batch_size": 1, "shuffle_buffer_size": 0}
    seen = [key for rank in (0, 1) for key in flat(take(build(model, dataset, rank=rank, **options), 27))]
    assert seen == [f"{index:06d}" for index in range(54)]


def test_seed_changes_the_order(model, dataset):
    assert keys(take(build(model, dataset, seed=1), 5)) != keys(take(build(model, dataset, seed=2), 5))


def test_without_shuffling_the_order_is_the_shards(model, dataset):
    batches = take(build(model, dataset, shuffle_buffer_size=0), 28)
    order = [f"{index:06d}" for index in (*range(54), 0, 1)]
    assert flat(batches) == order


def test_validation_is_the_same_each_time_and_as_long_on_every_rank(model, dataset):
    for num_workers in (0, 1):
        first, second, again = (
            take(build(model, dataset, valid_loader, rank, 2, num_workers=num_workers), 7) for rank in (0, 1, 0)
        )
        assert len(first) == len(second) == 7
        assert {*flat(first), *flat(second)} == {f"{index:06d}" for index in range(54, 60)}
        assert_same(again, first)


def test_validating_in_between_does_not_move_training(model, dataset):
    expected = take(build(model, dataset), 6)
    batches = iter(build(model, dataset))
    first = list(islice(batches, 3))
    take(build(model, dataset, valid_loader), 4)
    assert_same([*first, *islice(batches, 3)], expected)


def test_more_workers_than_samples(model, dataset):
    """Six validation samples for five ranks of two workers: none waits forever for a sample."""
    for rank in (0, 4):
        assert len(take(build(model, dataset, valid_loader, rank, 5, num_workers=2), 2)) == 2
    with pytest.raises(ValueError, match="split val has 6 samples for 7 data-parallel ranks"):
        build(model, dataset, valid_loader, 0, 7)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"num_workers": 1}, "num_workers was 0 .* and is 1"),
        ({"micro_batch_size": 3}, "micro_batch_size was 2 .* and is 3"),
        ({"seed": 5}, "seed was 1 .* and is 5"),
        ({"length": 100}, "decoder_seq_length was 256 .* and is 100"),
        ({"prompt_format": "plain"}, "prompt_format was mistral .* and is plain"),
        ({"shuffle_buffer_size": 11}, "shuffle_buffer_size was 10 .* and is 11"),
    ],
)
def test_position_in_something_else_is_refused(changed, named, model, dataset):
    """Energon would take it without a word."""
    loader = build(model, dataset)
    next(iter(loader))
    with pytest.raises(ValueError, match=named) as caught:
        resume(model, dataset, save_position(loader), **changed)
    assert "\n" not in str(caught.value)


@pytest.fixture
def of_two_ranks(model, dataset):
    """A function (steps, **options) -> positions of two ranks with two workers each, and the batches after them.

    A step has 8 batches, 4 of each rank.
    """

    def make(steps, **options):
        loaders = [build(model, dataset, rank=rank, world_size=2, num_workers=2, **options) for rank in (0, 1)]
        batches = [iter(loader) for loader in loaders]
        for each in batches:
            list(islice(each, 4 * steps))
        positions = [save_position(loader) for loader in loaders]
        following = [[batch for each in batches for batch in islice(each, 4)] for _ in range(5)]
        for each in batches:
            each.close()
        return positions, following

    return make


@pytest.mark.parametrize(("world_size", "packing_buffer_size"), [(1, 5), (4, 0)])
def test_another_number_of_ranks_goes_on_exactly(world_size, packing_buffer_size, of_two_ranks, model, dataset):
    """Every step has the batches that it would have had, the epoch's end included."""
    options = {"micro_batch_size": 1, "global_batch_size": 8, "packing_buffer_size": packing_buffer_size}
    positions, expected = of_two_ranks(4, **options)
    loaders = [
        resume(model, dataset, *positions, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]
    batches = [iter(loader) for loader in loaders]
    for step in expected:
        taken = [batch for each in batches for batch in islice(each, 8 // world_size)]
        assert_same(*(sorted(these, key=lambda batch: batch.keys) for these in (taken, step)))
    # From there, two ranks again.
    positions = [save_position(loader) for loader in loaders]
    for each in batches:
        each.close()
    (first, *_) = (take(resume(model, dataset, *positions, rank=rank, world_size=2, **options), 4) for rank in (0, 1))
    assert len(first) == 4


@pytest.mark.parametrize(
    ("world_size", "global_batch_size", "named"),
    [
        (3, 24, r"saved by 2 data-parallel ranks with 2 reading processes each, and there are 3 .*\(4\) is a multiple"),
        (4, 12, r"the micro batches of an iteration \(6\) a multiple of it; use 2 ranks, or begin a new run"),
        (4, 16, r"in the middle of a round of the 4 reading processes, .*; use 2$"),
    ],
)
def test_ranks_that_cannot_go_on_exactly_are_refused(world_size, global_batch_size, named, model, dataset):
    loaders = [build(model, dataset, rank=rank, world_size=2, num_workers=2) for rank in (0, 1)]
    batches = [iter(loader) for loader in loaders]
    for each in batches:
        next(each)
    positions = [save_position(loader) for loader in loaders]
    for each in batches:
        each.close()  # left to the garbage collector, each process would take five seconds
    with pytest.raises(ValueError, match=named) as caught:
        resume(model, dataset, *positions, world_size=world_size, global_batch_size=global_batch_size)
    assert "\n" not in str(caught.value)


def test_position_in_another_dataset_is_refused_and_a_moved_one_is_the_same(model, dataset, tmp_path):
    position = save_position(build(model, dataset))
    shutil.copytree(dataset, tmp_path / "moved")
    resume(model, tmp_path / "moved", position)
    # The same images, one other letter in a caption: even the index is the same.
    entries = write_pretrain(tmp_path / "raw", COUNT)
    entries[0]["conversations"][1]["value"] = "Image number 0"
    write_annotations(tmp_path / "raw", entries)
    convert_folder(tmp_path / "raw")
    with pytest.raises(ValueError, match="position in the data: dataset was"):
        resume(model, tmp_path / "raw" / "wds", position)


def test_packing_uses_every_sample_once_an_epoch(model, dataset):
    """The buffer is no larger than what there is."""
    loader = build(model, dataset, micro_batch_size=1, packing_buffer_size=1000, shuffle_buffer_size=0)
    seen = []
    for batch in loader:
        seen += batch.keys
        if len(seen) >= 54:
            break
    assert sorted(seen) == [f"{index:06d}" for index in range(54)]


def test_a_corrupt_picture_leaves_its_pack(model, dataset, tmp_path):
    damaged = damage(dataset, tmp_path / "wds", 1)
    loader = build(model, damaged, micro_batch_size=1, packing_buffer_size=54, shuffle_buffer_size=0)
    seen = []
    for batch in loader:
        seen += batch.keys
        if len(seen) >= 53:
            break
    assert sorted(seen) == [f"{index:06d}" for index in range(1, 54)]
    assert loader.failures.count == 1


def damage(dataset, target, count):
    """A copy of the dataset in which the images of the first `count` samples of shard 0 do not decode."""
    shutil.copytree(dataset, target)
    tar = (target / "00000.tar").read_bytes()
    pieces = tar.split(b"\xff\xd8\xff")
    for index in range(1, count + 1):
        pieces[index] = pieces[index][:20] + bytes(200) + pieces[index][220:]
    (target / "00000.tar").write_bytes(b"\xff\xd8\xff".join(pieces))
    return target


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_sample_is_named_once_and_counted(num_workers, model, dataset, tmp_path, caplog, capfd):
    loader = build(model, damage(dataset, tmp_path / "wds", 1), num_workers=num_workers, micro_batch_size=1)
    caplog.set_level(logging.WARNING)
    batches = take(loader, 130)
    assert ["000000"] not in keys(batches)
    # Two epochs and more, one sample: counted once. A worker's log lines are in its own process.
    assert loader.failures.count == 1
    if num_workers == 0:
        (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
        assert line.startswith("left out sample 000000: sample 000000: image cannot be read")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_corrupt_samples_end_the_run(num_workers, model, dataset, tmp_path):
    loader = build(model, damage(dataset, tmp_path / "wds", 3), num_workers=num_workers)
    why = "^/.*/wds: more than 1 of a rank's 54 samples cannot be read; .*; the last: sample 00000"
    with pytest.raises(ValueError, match=why) as caught:
        take(loader, 60)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_dataset_is_answered_in_one_line(model, dataset, tmp_path):
    cases = {tmp_path: "not an energon dataset", tmp_path / "none": "missing"}
    no_split = shutil.copytree(dataset, tmp_path / "no split")
    (no_split / ".nv-meta" / "split.yaml").write_text("split_parts:\n  train: []\n  val: []\n")
    cases[no_split] = "split train cannot be read: No shards found"
    broken = shutil.copytree(dataset, tmp_path / "broken")
    (broken / ".nv-meta" / ".info.json").write_text(json.dumps({"shard_counts": {}}))
    cases[broken] = "split train cannot be read"
    for path, why in cases.items():
        with pytest.raises(ValueError, match=why) as caught:
            build(model, path)
        assert "convert_llava_pretrain_to_wds.py" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_validation_needs_a_path(model, dataset):
    config = settings(model[0], dataset)
    config = replace(config, data=replace(config.data, valid_data_path=None))
    with pytest.raises(ValueError, match="--valid-data-path none"):
        valid_loader(config, model[1], rank=0, world_size=1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tar: tar.unlink(), "00002.tar: missing, though the dataset lists it"),
        (lambda tar: os.truncate(tar, 5000), r"00002.tar: 5000 bytes, expected \d+ by its index"),
        (lambda tar: tar.with_name("00002.tar.idx").unlink(), "00002.tar.idx: missing, though the dataset lists it"),
        (lambda tar: os.truncate(f"{tar}.idx", 13), "00002.tar.idx: 13 bytes, expected 8 for each place"),
        (lambda tar: os.truncate(f"{tar}.idx", 0), "00002.tar.idx: 0 bytes, expected 8 for each place"),
    ],
    ids=["missing", "cut off", "no index", "index cut off", "empty index"],
)
def test_a_shard_that_is_not_whole_is_named_before_training(model, dataset, tmp_path, damage, said):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    damage(copy / "00002.tar")
    with pytest.raises(ValueError, match=said):
        build(model, copy)


def test_reading_begins_at_once_and_draws_no_number_of_the_models(model, dataset):
    """Ranks that do not read would else begin with other weights."""
    loader, numbers = build(model, dataset, num_workers=1), torch.get_rng_state()
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    (reader,) = set(multiprocessing.active_children()) - before
    next(batches)
    assert torch.equal(torch.get_rng_state(), numbers)
    batches.close()
    assert not reader.is_alive()


def test_a_killed_process_is_not_the_datas_fault(model, dataset):
    loader = build(model, dataset, num_workers=1)
    batches = iter(loader)
    next(batches)
    os.kill(loader.workers[0].pid, signal.SIGKILL)
    with pytest.raises(
        ValueError, match=r"a process that reads was killed by SIGKILL; if memory ran out, use fewer --num-workers"
    ):
        list(islice(batches, 100))


def test_a_process_that_cannot_be_started(model, dataset, monkeypatch):
    def fork():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    loader = build(model, dataset, num_workers=1)
    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(ValueError, match=r"cannot be started \(.*Cannot allocate memory\); use fewer --num-workers"):
        iter(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_shard_is_one_line(model, dataset, tmp_path, num_workers):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    for tar in copy.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:512] + b"\xff" * (tar.stat().st_size - 512))
    with pytest.raises(ValueError, match=r"copy: reading failed \(.*\); convert the data again") as caught:
        take(build(model, copy, num_workers=num_workers), 30)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
