"""A loss that is NaN on one rank ends all of them at once, with the same words."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from megatron.core import parallel_state

from megatron_patch.config.train import Config, Parallel
from megatron_patch.families.llava import read_config
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs
from tests.distributed.ranks import run_jobs

CUTS = {"DP2": Parallel(), "PP2": Parallel(pipeline_model_parallel_size=2)}


def spoilt_step(config: Config) -> tuple[str, float]:
    """What a step says that has NaN in the weights of rank 1 alone, and the seconds that it takes."""
    llava = read_config(config.model.description)
    chunks, wrapped, optimizer, _ = start_or_resume(config, llava)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches, run = itertools.cycle(tiny_runs.batches(llava, 2)[rank::size]), batch_runner(config, llava)
    train_step(wrapped, optimizer, batches, run)
    if torch.distributed.get_rank() == 1:
        chunks[0].language_model.decoder.layers[-1].mlp.linear_fc2.weight.data.fill_(float("nan"))
    start = time.monotonic()
    try:
        train_step(wrapped, optimizer, batches, run)
    except FloatingPointError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("a loss that is NaN goes unnoticed")


@pytest.fixture(scope="module")
def reports(mcore, tmp_path_factory) -> dict[str, list[tuple[str, float]]]:
    jobs = []
    for cut in CUTS.values():
        config = tiny_runs.config(mcore, tmp_path_factory.mktemp("nan"), parallel=cut)
        jobs.append((spoilt_step, cut, (config,)))
    return dict(zip(CUTS, run_jobs(jobs, 2), strict=True))


@pytest.mark.parametrize(("name", "samples"), [("DP2", "1-0, 1-1"), ("PP2", "0-0, 0-1")])
def test_all_ranks_name_the_samples(reports, name, samples):
    errors, seconds = zip(*reports[name], strict=True)
    assert set(errors) == {f"the loss of samples {samples} is NaN"}
    assert max(seconds) < 30
