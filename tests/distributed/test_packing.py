"""Samples that share a sequence train as if each had its own."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state

from megatron_patch.config.train import Config, Parallel
from megatron_patch.data.task_encoder import Batch
from megatron_patch.families.llava import read_config
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs
from tests.distributed.ranks import run_jobs, run_ranks

STEPS = 3
MULTIPLE = 8


def pack(batch: Batch) -> Batch:
    """The rows of a batch one after the other, each without its padding but for what CP and TP need."""
    parts = []
    for row, labels in zip(batch.input_ids, batch.labels, strict=True):
        length = -(-(int((labels != -100).nonzero()[-1]) + 1) // MULTIPLE) * MULTIPLE
        parts.append((row[:length], labels[:length]))
    ids, labels = (torch.cat(column)[None] for column in zip(*parts, strict=True))
    return replace(batch, input_ids=ids, labels=labels, segment_lengths=[len(part) for part, _ in parts])


def train(config: Config) -> list[tuple[float, float, int, int]]:
    """Loss, gradient norm, samples and tokens of a few steps on the same two micro batches."""
    llava = read_config(config.model.description)
    _, wrapped, optimizer, _ = start_or_resume(config, llava)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = tiny_runs.batches(llava, 2)[rank::size]
    batches = itertools.cycle([pack(batch) for batch in batches] if config.data.packs else batches)
    run = batch_runner(config, llava)
    reports = []
    for _ in range(STEPS):
        step = train_step(wrapped, optimizer, batches, run)
        reports.append((step.totals.loss, step.grad_norm, step.totals.num_samples, step.totals.num_tokens))
    return reports


def packing(config: Config) -> Config:
    data = replace(config.data, micro_batch_size=1, global_batch_size=2, packing_buffer_size=8)
    return replace(config, data=data)


CASES = {
    "one": (1, {}, {}),
    "one, sel": (1, {}, {"recompute": "sel"}),
    "one, full": (1, {}, {"recompute": "full"}),
    "CP2": (2, {"context_parallel_size": 2}, {}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}, {}),
    "PP4": (4, {"pipeline_model_parallel_size": 4}, {}),
    "CP2xTP2+SP": (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2}, {}),
}
"""Number of processes, how they are cut, other settings."""


@pytest.fixture(scope="module")
def reports_of(mcore, tmp_path_factory):
    """A case's reports. All cases of a number of processes are computed at once, on the same ones."""
    folder = tmp_path_factory.mktemp("packing")

    @functools.cache
    def compute(world_size: int) -> dict[str, list]:
        names, jobs = [], []
        for name, (size, sizes, changed) in CASES.items():
            if size == world_size:
                cut = Parallel(**sizes)
                names.append(name)
                jobs.append((train, cut, (packing(tiny_runs.config(mcore, folder, parallel=cut, **changed)),)))
        return dict(zip(names, run_jobs(jobs, world_size), strict=True))

    return lambda name: compute(CASES[name][0])[name]


@pytest.fixture(scope="module")
def expected(mcore, tmp_path_factory):
    """Each sample in a row of its own, one process."""
    config = tiny_runs.config(mcore, tmp_path_factory.mktemp("rows"))
    (reports,) = run_ranks(train, Parallel(), 1, config)
    return reports


@pytest.mark.parametrize("name", CASES)
def test_packed_samples_train_as_alone(reports_of, expected, name):
    for reports in reports_of(name):
        for (loss, norm, *counts), (expected_loss, expected_norm, *expected_counts) in zip(
            reports, expected, strict=True
        ):
            assert loss == pytest.approx(expected_loss, abs=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
            assert counts == expected_counts
