"""What data-parallel ranks save together: each its own optimizer states and a share of the weights."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed import checkpoint as torch_checkpoint

from megatron_patch.config.train import Config, Parallel
from megatron_patch.conversion.companions import checkpoint_folder
from megatron_patch.families.llava import read_config
from megatron_patch.stores import checksums
from megatron_patch.stores.torch_dist import model_tensors, read_metadata
from megatron_patch.training import optimizer as optimizer_module
from megatron_patch.training import resume, saving
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.resume import Progress, model_state, optimizer_state
from megatron_patch.training.saving import Saver
from tests import tiny_runs
from tests.distributed.ranks import run_jobs

OVERLAPPED = {"overlap_grad_reduce": True}
DP4, DP4_BUCKETS = Parallel(), Parallel(**OVERLAPPED)
TP2 = Parallel(tensor_model_parallel_size=2, **OVERLAPPED)
PP2, CP2 = Parallel(pipeline_model_parallel_size=2), Parallel(context_parallel_size=2)
CUTS = {
    "DP4": (DP4, TP2),
    "DP4 in buckets": (DP4_BUCKETS, PP2),
    "TP2": (TP2, DP4),
    "PP2": (PP2, TP2),
    "CP2": (CP2, DP4_BUCKETS),
}
"""How four processes save, and then go on."""


def build(config: Config):
    """The model in pieces, its optimizer with states, in several buckets where gradients are overlapped."""
    llava = read_config(config.model.description)
    with pytest.MonkeyPatch.context() as patch:
        stock = optimizer_module.DistributedDataParallelConfig
        patch.setattr(optimizer_module, "DistributedDataParallelConfig", functools.partial(stock, bucket_size=20_000))
        chunks, _, optimizer, _ = start_or_resume(config, llava, resume.find(config))
    optimizer.state_dict()  # makes them
    return chunks, optimizer


def states(optimizer) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """This rank's parts of the weights, and the states of each."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter.detach(), part.optimizer.state[parameter]


def save(config: Config) -> None:
    """Save states that tell which weight they are of."""
    chunks, optimizer = build(config)
    for weight, state in states(optimizer):
        state["exp_avg"].copy_(2 * weight)
        state["exp_avg_sq"].copy_(weight * weight)
    Saver(config, chunks, optimizer).save(Progress(1, 0), None)


def load(config: Config) -> int:
    """How many weights' states this rank has, when all of them are those of their weights."""
    _, optimizer = build(config)
    for weight, state in states(optimizer):
        assert torch.equal(state["exp_avg"], 2 * weight)
        assert torch.equal(state["exp_avg_sq"], weight * weight)
    return sum(weight.numel() for weight, _ in states(optimizer))


def memory(config: Config) -> tuple[int, int, int]:
    """Bytes that a save and a resume take beside the optimizer's own, and how many weights' states the rank has."""
    chunks, optimizer = build(config)
    model = model_state(chunks)
    taken = []
    collectives = ("all_gather", "gather", "all_gather_into_tensor", "scatter", "broadcast")
    for is_loading in (False, True):
        with mock.patch.multiple(dist, **dict.fromkeys(collectives)):  # None is not callable
            state = optimizer_state(optimizer, model, is_loading)
        own = [tensor for weight, state in states(optimizer) for tensor in (weight, *state.values())]
        pointers = {tensor.untyped_storage().data_ptr() for tensor in own}
        tensors = [tensor.data for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        taken.append(sum(size for pointer, size in storages.items() if pointer not in pointers))
    return (*taken, sum(weight.numel() for weight, _ in states(optimizer)))


def save_on_a_slow_disk(config: Config) -> None:
    """One rank writes for longer than a collective may take."""
    chunks, optimizer = build(config)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=5), dist.group.WORLD)

    def write(*arguments):
        time.sleep(8 if dist.get_rank() == 1 else 0)
        stock(*arguments)

    stock = saving._write
    with mock.patch.object(saving, "_write", write):
        Saver(config, chunks, optimizer).save(Progress(1, 0), None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp("run") for name in CUTS}


@pytest.fixture(scope="module")
def results(mcore, folders) -> dict[str, list]:
    """What the ranks of each job returned: saves, resumes and, under another name, memory."""
    jobs = {}
    for name, (before, after) in CUTS.items():
        for function, cut in ((save, before), (load, after)):
            config = tiny_runs.config(mcore, folders[name], parallel=cut, global_batch_size=8)
            jobs[name, function] = (function, cut, (config,))
    for name, cut in {"memory": DP4, "memory in buckets": DP4_BUCKETS}.items():
        config = tiny_runs.config(mcore, folders["DP4"] / "new", parallel=cut, global_batch_size=8)
        jobs[name, memory] = (memory, cut, (config,))
    config = tiny_runs.config(mcore, folders["DP4"] / "slow", parallel=DP4, global_batch_size=8)
    jobs["slow", save_on_a_slow_disk] = (save_on_a_slow_disk, DP4, (config,))
    return dict(zip(jobs, run_jobs(list(jobs.values()), 4), strict=True))


@pytest.mark.parametrize("name", CUTS)
def test_states_are_stored_as_their_weights_are(results, folders, name):
    folder = checkpoint_folder(folders[name] / "checkpoint")
    metadata = read_metadata(folder / ".metadata").state_dict_metadata
    weights = model_tensors(read_metadata(folder / ".metadata"))
    expected = {f"optimizer.state.{state}.{key}" for state in ("param", "exp_avg", "exp_avg_sq") for key in weights}
    assert {key for key in metadata if key.startswith("optimizer.")} == expected
    stored = {key: torch.empty(tuple(metadata[key].size)) for key in (*weights, *expected)}
    torch_checkpoint.load(stored, storage_reader=torch_checkpoint.FileSystemReader(folder), no_dist=True)
    for key in weights:
        assert torch.equal(stored[f"optimizer.state.param.{key}"], stored[key]), key
        assert torch.equal(stored[f"optimizer.state.exp_avg.{key}"], 2 * stored[key]), key
        assert torch.equal(stored[f"optimizer.state.exp_avg_sq.{key}"], stored[key] ** 2), key


@pytest.mark.parametrize("name", CUTS)
def test_other_sizes_go_on(results, name):
    assert min(results[name, load]) > 0


@pytest.mark.parametrize("name", ["memory", "memory in buckets"])
def test_a_rank_takes_memory_for_its_own_states_alone(results, name):
    """Nothing where they are kept in fp32, and no rank hears of another's."""
    for save_bytes, load_bytes, weights in results[name, memory]:
        assert save_bytes == 0
        assert load_bytes == 12 * weights
    own = [weights for *_, weights in results[name, memory]]
    assert max(own) < 1.1 * sum(own) / 4


def test_each_rank_writes_a_share(results, folders):
    """Of states and weights: four ranks a quarter each."""
    folder = checkpoint_folder(folders["DP4"] / "checkpoint")
    written = Counter()
    for file in folder.glob("*.distcp"):
        written[file.name.split("_")[2]] += file.stat().st_size
    assert len(written) == 4
    assert max(written.values()) < 1.2 * min(written.values())
    assert {file.name for file in folder.glob("*.distcp")} <= checksums.read(folder).keys()


def test_others_wait_for_a_slow_disk(results, folders):
    checksums.check(checkpoint_folder(folders["DP4"] / "slow" / "checkpoint"))
