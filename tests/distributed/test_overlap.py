"""Communication behind computation changes nothing: losses, and what is saved on the way."""

from __future__ import annotations

import functools
import itertools

import pytest
from megatron.core import parallel_state

from megatron_patch.config.train import Config, Parallel
from megatron_patch.families.llava import read_config
from megatron_patch.training import optimizer as optimizer_module
from megatron_patch.training import resume
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.optimizer import build_scheduler, gather_weights
from megatron_patch.training.resume import Progress
from megatron_patch.training.saving import Saver
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs
from tests.distributed.ranks import run_jobs


def train(config: Config, steps: int) -> list[float]:
    """Losses of `steps` steps from where the last call with this output ended, and a norm of the weights that it saves.

    One of the four micro batches has no images.
    """
    llava = read_config(config.model.description)
    with pytest.MonkeyPatch.context() as patch:
        stock = optimizer_module.DistributedDataParallelConfig
        # Several buckets, as a model of some size has them.
        patch.setattr(optimizer_module, "DistributedDataParallelConfig", functools.partial(stock, bucket_size=20_000))
        chunks, wrapped, optimizer, progress = start_or_resume(config, llava, resume.find(config))
    assert len(wrapped[0].bucket_groups) > (3 if config.parallel.overlap_grad_reduce else 0)
    scheduler = build_scheduler(optimizer, config, progress.iteration)
    made = tiny_runs.batches(llava, 4)
    made[3].input_ids[made[3].input_ids == llava.image_token_id] = 7
    made[3].pixels = made[3].pixels[:0]
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches, run = itertools.cycle(made[rank::size]), batch_runner(config, llava)
    losses = []
    for _ in range(steps):
        scheduler.step(1)
        losses.append(train_step(wrapped, optimizer, batches, run).totals.loss)
    gather_weights(wrapped, config)
    Saver(config, chunks, optimizer).save(Progress(progress.iteration + steps, 0), None)
    norm = sum(parameter.detach().double().square().sum() for parameter in chunks[0].parameters()).sqrt()
    return [*losses, norm.item()]


def train_twice(config: Config) -> list[float]:
    """What four steps report, and their continuation after a restart."""
    return train(config, 4) + train(config, 4)


CASES = {
    "plain": {},
    "gradients and weights": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "gradients, plain optimizer": {"overlap_grad_reduce": True, "use_distributed_optimizer": False},
}


@pytest.fixture(scope="module")
def reports(mcore, tmp_path_factory) -> dict[str, list[float]]:
    """What the first rank of each case reports."""
    jobs = []
    for name, flags in CASES.items():
        cut = Parallel(**flags)
        config = tiny_runs.config(mcore, tmp_path_factory.mktemp(name), parallel=cut, global_batch_size=8)
        jobs.append((train_twice, cut, (config,)))  # two micro batches per rank
    return dict(zip(CASES, (first for first, _ in run_jobs(jobs, 2)), strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if name != "plain"])
def test_overlapping_changes_nothing(reports, name):
    assert reports[name] == pytest.approx(reports["plain"], abs=1e-5)
