"""A run that ended at any moment, started again, is the unbroken run bit for bit; or it says why it cannot be."""

from __future__ import annotations

import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_patch.config.train import Config, Parallel
from megatron_patch.conversion.companions import TRACKER
from megatron_patch.stores import checksums
from tests import tiny_runs
from tests.distributed import runs
from tests.distributed.runs import train
from tests.unit.data.samples import convert_folder, write_annotations, write_pretrain

STEPS = 5
INTERVAL = 2
ONE, TP2, PP2 = Parallel(), Parallel(tensor_model_parallel_size=2), Parallel(pipeline_model_parallel_size=2)
CUTS = pytest.mark.parametrize("cut", [ONE, PP2], ids=["one process", "PP2"])
POINTS = ("state written", "renamed", "latest_checkpointed_iteration.txt written", "tracker renamed")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    entries = write_pretrain(folder / "raw", 30)
    entries[24]["conversations"][1]["value"] = 9 * "a long caption "
    write_annotations(folder / "raw", entries)
    convert_folder(folder / "raw")
    return folder / "raw" / "wds"


@pytest.fixture(scope="module")
def settings(mcore, dataset):
    """A function (output, cut, **fields of Checkpoint) -> Config."""

    def make(output: Path, cut: Parallel = ONE, **checkpoint) -> Config:
        config = tiny_runs.config(mcore, output, parallel=cut, train_iters=STEPS)
        return replace(
            config,
            data=replace(config.data, data_path=dataset, num_workers=1, shuffle_buffer_size=8),
            checkpoint=replace(config.checkpoint, save_interval=INTERVAL, **checkpoint),
        )

    return make


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
    """A function (cut) -> (losses, sums of the last weights) of a run that saves without a background process."""
    known = {}

    def get(cut: Parallel):
        if cut not in known:
            output = tmp_path_factory.mktemp("unbroken")
            end = train(settings(output, cut), cut.model_parallel_size)
            assert end.codes == [0] * cut.model_parallel_size, end
            known[cut] = (runs.losses(output), runs.weights(output))
        return known[cut]

    return get


def assert_same(output: Path, unbroken) -> None:
    assert runs.losses(output) == unbroken[0]
    assert runs.weights(output) == unbroken[1]


def tracked(config: Config) -> int:
    """The iteration that a run would go on from; its files are what was written."""
    iteration = int((config.checkpoint.folder / TRACKER).read_text())
    checksums.check(config.checkpoint.folder / f"iter_{iteration:07d}")
    return iteration


@CUTS
def test_killed_after_every_step(settings, unbroken, tmp_path, cut):
    """Killed after its first step, resumed and killed after the third, and so on; it saves in the background.

    Several processes, whose starts take long, are killed once.
    """
    config, size = settings(tmp_path, cut, async_save=True), cut.model_parallel_size
    for step in (1, 3, 5) if size == 1 else (3,):
        rank = step % size
        end = train(config, size, (runs.killed_after_step, rank, (step,)))
        assert end.codes[rank] == -signal.SIGKILL, end
    assert train(config, size).codes == [0] * size
    assert_same(tmp_path, unbroken(cut))


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_saving(settings, unbroken, tmp_path, point):
    """In the second save. The tracker names the first until the second is whole; nothing half-written stays."""
    config = settings(tmp_path, async_save=True)
    assert train(config, 1, (runs.killed_at, 0, (point, 2))).codes == [-signal.SIGKILL]
    assert tracked(config) == (2 * INTERVAL if point == "tracker renamed" else INTERVAL)
    assert train(config, 1).codes == [0]
    assert not list(config.checkpoint.folder.glob("*.partial"))
    assert_same(tmp_path, unbroken(ONE))


def test_killed_while_the_background_writes(settings, unbroken, tmp_path):
    """What it began is not taken for a checkpoint, and the process that wrote ends with it."""
    config = settings(tmp_path, async_save=True)
    end = train(config, 1, (runs.trainer_killed_while_its_writer_works, 0, (INTERVAL,)))
    assert end.codes == [-signal.SIGKILL], end
    (partial,) = config.checkpoint.folder.glob("*.partial")
    stat = Path("/proc", (partial / "__0_0.distcp").read_text(), "stat")
    deadline = time.monotonic() + 10
    while stat.exists() and " Z " not in stat.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (config.checkpoint.folder / TRACKER).exists()
    assert train(config, 1).codes == [0]
    assert_same(tmp_path, unbroken(ONE))


def test_the_background_process_is_killed(settings, tmp_path):
    """The run ends with one line, and the checkpoint before is whole and the only thing there."""
    config = settings(tmp_path, PP2, async_save=True)
    end = train(config, 2, (runs.writer_ends, 1, (2 * INTERVAL, 0)))
    assert end.codes == [1, 1]
    assert len(set(end.errors)) == 1
    assert "iter_0000004: cannot be saved (a process that writes was killed); the checkpoints before" in end.errors[0]
    assert tracked(config) == INTERVAL
    assert [path.name for path in config.checkpoint.folder.glob("iter_*")] == [f"iter_{INTERVAL:07d}"]


@pytest.mark.parametrize(("rank", "size", "asynchronous"), [(1, 2**20, True), (0, 2**12, False)], ids=str)
def test_no_room_for_a_checkpoint(settings, tmp_path, rank, size, asynchronous):
    """For a rank's weights, or for what rank 0 writes beside them: one line, and nothing half-written is left."""
    config = settings(tmp_path, PP2, async_save=asynchronous)
    end = train(config, 2, (runs.files_limited_after_step, rank, (2 * INTERVAL - 1, size)))
    assert end.codes[rank] == 1
    assert any("File too large" in said or "is the disk full?" in said for said in end.errors), end
    assert all("\n" not in said for said in end.errors)
    assert tracked(config) == INTERVAL
    assert [path.name for path in config.checkpoint.folder.glob("iter_*")] == [f"iter_{INTERVAL:07d}"]


def test_a_signal_to_one_rank(settings, unbroken, tmp_path):
    """All finish the step, save, in the background too, and end with the signal's code."""
    config = settings(tmp_path, PP2, async_save=True)
    end = train(config, 2, (runs.signalled_after_step, 1, (3, signal.SIGTERM)))
    assert end.codes == [128 + signal.SIGTERM] * 2, end
    assert tracked(config) == 3
    assert train(config, 2).codes == [0, 0]
    assert_same(tmp_path, unbroken(PP2))


def test_a_run_set_back_by_hand_keeps_what_it_saves(settings, tmp_path):
    """Newer checkpoints than its own are there, and only one is to be kept."""
    config = settings(tmp_path)
    assert train(config, 1).codes == [0]
    (config.checkpoint.folder / TRACKER).write_text(str(INTERVAL))
    end = train(settings(tmp_path, keep_checkpoints=1), 1, (runs.killed_after_step, 0, (STEPS,)))
    assert end.codes == [-signal.SIGKILL]
    assert tracked(config) == 2 * INTERVAL
    assert sorted(path.name for path in config.checkpoint.folder.glob("iter_*")) == ["iter_0000004", "iter_0000005"]


def test_another_cut_goes_on(settings, unbroken, tmp_path):
    """TP2 goes on as PP2: the same samples, losses equal but for the order of sums."""
    assert train(settings(tmp_path, TP2), 2, (runs.killed_after_step, 0, (3,))).codes[0] == -signal.SIGKILL
    assert train(settings(tmp_path, PP2), 2).codes == [0, 0]
    assert runs.losses(tmp_path) == pytest.approx(unbroken(ONE)[0], abs=1e-5)


def test_another_number_of_data_parallel_ranks_goes_on(settings, tmp_path):
    """Two with a reading process each go on as one with two: the same samples, losses equal but for sums' order."""
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    assert train(settings(unbroken), 2).codes == [0, 0]
    assert train(settings(resumed), 2, (runs.killed_after_step, 0, (3,))).codes[0] == -signal.SIGKILL
    assert train(settings(resumed), 1).codes == [0]
    assert runs.losses(resumed) == pytest.approx(runs.losses(unbroken), abs=1e-5)


def test_a_loss_that_is_nan(settings, tmp_path):
    """It ends before the step changes anything, names samples, and the last checkpoint is of before."""
    config = settings(tmp_path, PP2)
    end = train(config, 2, (runs.weights_spoilt_after_step, 0, (3,)))
    said = r"FloatingPointError: the loss of samples .*0000.* is NaN"
    assert [bool(re.fullmatch(said, error)) for error in end.errors] == [True, True], end
    assert tracked(config) == INTERVAL
    assert sorted(runs.losses(tmp_path)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("count", "named"),
    [
        (11, "stage 0: 000015, 000001; stage 1: 000001, 000012"),
        (14, "stage 0: 000012, 000024; stage 1: 000012, 000023"),
    ],
    ids=["of equal lengths", "of other lengths"],
)
def test_a_stage_that_leaves_out_a_sample_alone(settings, tmp_path, count, named):
    """It ends before the step changes anything, and says which samples; the last checkpoint is of before."""
    config = settings(tmp_path, PP2)
    end = train(config, 2, (runs.sample_unreadable, 1, (count,)))
    assert 0 not in end.codes
    assert {
        error.endswith(f"; the same command goes on from the last checkpoint ({named})") for error in end.errors
    } == {True}, end
    assert tracked(config) == INTERVAL


class TestRefused:
    """What cannot go on exactly, or is damaged: one line, the same on all ranks."""

    @pytest.fixture(scope="class")
    def saved(self, settings, tmp_path_factory) -> Config:
        config = settings(tmp_path_factory.mktemp("saved"), PP2, keep_checkpoints=1)
        assert train(config, 2, (runs.killed_after_step, 0, (4,))).codes[0] == -signal.SIGKILL
        return config

    def refused(self, config: Config, fault: runs.Fault | None = None) -> set[str]:
        end = train(config, 2, fault)
        assert end.codes == [1, 1]
        return set(end.errors)

    @pytest.mark.parametrize(
        ("file", "damage"),
        [
            ("__1_1.distcp", "flipped"),
            (".metadata", "missing"),
        ],
    )
    def test_damaged(self, saved, file, damage):
        path = saved.checkpoint.folder / f"iter_{INTERVAL:07d}" / file
        good = path.read_bytes()
        half = len(good) // 2
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(good[:half] + bytes([good[half] ^ 1]) + good[half + 1 :])
        try:
            (error,) = self.refused(saved)
        finally:
            path.write_bytes(good)
        said = "missing, though" if damage == "missing" else "not what was written"
        assert f"{path}: {said}" in error
        assert f"write an earlier iteration into {saved.checkpoint.folder / TRACKER}" in error
        assert "\n" not in error

    def test_no_tracker(self, saved):
        tracker = saved.checkpoint.folder / TRACKER
        text = tracker.read_text()
        tracker.unlink()
        (error,) = self.refused(saved)
        tracker.write_text(text)
        assert f"has iter_{INTERVAL:07d} and no {TRACKER}; write the iteration to go on from into it" in error

    def test_a_position_that_is_not_listed(self, saved):
        """It would be unpickled."""
        folder = saved.checkpoint.folder / f"iter_{INTERVAL:07d}"
        sums = checksums.read(folder)
        checksums.write(folder, {name: digest for name, digest in sums.items() if name != "data_position_000.pt"})
        (error,) = self.refused(saved)
        checksums.write(folder, sums)
        assert f"{folder}/data_position_000.pt: not in SHA256SUMS" in error

    def test_a_folder_of_another_node(self, saved):
        (error,) = self.refused(saved, (runs.another_folder, 1, ()))
        assert f"ValueError: {saved.checkpoint.folder}/of another node: rank 1 on " in error
        assert error.endswith("give an output folder that all nodes share")

    def test_data_that_only_one_rank_reads(self, settings, tmp_path):
        config = settings(tmp_path, TP2)
        config = replace(config, data=replace(config.data, data_path=tmp_path / "none"))
        (error,) = self.refused(config)
        assert error.startswith(f"ValueError: {tmp_path}/none: missing; expected an energon dataset")

    @pytest.mark.parametrize(
        "fault",
        [(runs.readers_killed_while_loading, 0, ()), (runs.readers_killed_after_step, 0, (INTERVAL + 1,))],
        ids=["while loading", "between steps"],
    )
    def test_readers_that_are_killed(self, saved, fault):
        said = f"ValueError: {saved.data.data_path}: a process that reads was killed by SIGKILL; if memory ran out"
        end = train(saved, 2, fault)
        assert any(error.startswith(said) for error in end.errors), end

    def test_other_workers(self, saved):
        changed = replace(saved, data=replace(saved.data, num_workers=2))
        (error,) = self.refused(changed)
        assert "num_workers was 1 when it was saved and is 2 now" in error

    def test_other_data_parallel_size(self, saved):
        (error,) = self.refused(replace(saved, parallel=ONE))
        assert "saved by 1 data-parallel ranks with 1 reading processes each, and there are 2 ranks now" in error
