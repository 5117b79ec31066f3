"""Whole training runs, begun in no time and ended at a chosen moment.

One process imports everything and does nothing; the ranks of each run are forked from it.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo  # torch's optimizers import it when they are built
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_patch.config.train import Config
from megatron_patch.conversion.companions import checkpoint_folder
from megatron_patch.data.task_encoder import LlavaTaskEncoder
from megatron_patch.model import groups
from megatron_patch.stores import checksums
from megatron_patch.tensor_io import disk
from megatron_patch.training import loop, resume, saving
from megatron_patch.training.metrics import Metrics
from tests.forked import in_server

LOADED = (torch._dynamo, AutoTokenizer, PreTrainedTokenizerFast)
"""What every run would import again, for seconds."""

Fault = tuple[Callable[..., None], int, tuple]
"""What goes wrong, on which rank, and the function's arguments."""


class End(NamedTuple):
    """How each rank of a run ended."""

    codes: list[int]
    """Exit codes; that of a signal is negative."""
    errors: list[str]
    """What was raised, in words."""


def train(config: Config, world_size: int, fault: Fault | None = None) -> End:
    """Run the training loop, at most two minutes long."""
    return in_server(run, config, world_size, fault, seconds=120)


def run(config: Config, world_size: int, fault: Fault | None = None) -> End:
    """Train on forked processes. When one fails, the others are killed, as torchrun does it."""
    (config.checkpoint.output / "log").mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            fork.Process(target=_rank, args=(rank, world_size, Path(folder), config, fault))
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        deadline = None
        while any(rank.is_alive() for rank in ranks):
            failed = [rank.exitcode for rank in ranks if rank.exitcode]
            if failed and deadline is None:
                # One that ended by itself leaves the others time: they may have the same to say.
                deadline = time.monotonic() + (10 if max(failed) > 0 else 0)
            if deadline is not None and time.monotonic() >= deadline:
                for rank in ranks:
                    rank.kill()
            time.sleep(0.02)
        return End([rank.exitcode for rank in ranks], [path.read_text() for path in Path(folder).glob("error_*")])


def _rank(rank: int, world_size: int, folder: Path, config: Config, fault: Fault | None) -> None:
    torch.set_num_threads(1)
    if fault is not None and fault[1] == rank:
        action, _, arguments = fault
        action(*arguments)
    try:
        init_method = f"file://{folder}/store"
        groups.start(config.parallel, 1, timeout_minutes=2, init_method=init_method, rank=rank, world_size=world_size)
        code = loop.train(config)
    except Exception as error:
        (folder / f"error_{rank}").write_text(f"{type(error).__name__}: {error}")
        code = 1
    os._exit(code)  # as the training script ends


def kill() -> None:
    """SIGKILL for this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after_step(iteration: int) -> None:
    """Killed when a step is done and logged; what it would have saved is not."""
    after_step(iteration, kill)


def after_step(iteration: int, action: Callable[[], None]) -> None:
    log = Metrics.log

    def log_and_act(self, done, *arguments, **named):
        log(self, done, *arguments, **named)
        if done == iteration:
            action()

    Metrics.log = log_and_act


def killed_at(point: str, times: int) -> None:
    """Killed when a save reaches this point for the `times`th time."""
    seen = []

    def reached(name):
        seen.extend([name] * (name == point))
        if len(seen) == times:
            kill()

    disk.reached = reached


def writer_ends(iteration: int, seconds: float) -> None:
    """The process that writes this iteration in the background writes half, and is killed after some time."""

    def write(inner, sums, rank, buckets, results):
        path = Path(buckets[0][0])
        if f"iter_{iteration:07d}" in str(path):
            path.write_text(str(os.getpid()))
            time.sleep(seconds)
            kill()
        stock(inner, sums, rank, buckets, results)

    stock, saving._write = saving._write, write


def trainer_killed_while_its_writer_works(iteration: int) -> None:
    """Killed a step after the save of this iteration began, which takes longer."""
    writer_ends(iteration, seconds=60)
    killed_after_step(iteration + 1)


def signalled_after_step(iteration: int, number: int) -> None:
    """A signal comes when a step is through."""
    after_step(iteration, lambda: os.kill(os.getpid(), number))


def files_limited_after_step(iteration: int, size: int) -> None:
    """From then on no file of this process takes more than `size` bytes, as on a disk that is full."""
    after_step(iteration, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def weights_spoilt_after_step(iteration: int) -> None:
    """The projector's bias is no number when the next step begins."""
    build, chunks = loop.build_model, []

    def build_and_keep(*arguments):
        chunks.extend(build(*arguments))
        return chunks

    def spoil():
        for chunk in chunks:
            if chunk.pre_process:
                chunk.vision_projection.encoder.linear_fc2.bias.data.fill_(float("nan"))

    loop.build_model = build_and_keep
    after_step(iteration, spoil)


def readers_killed_while_loading() -> None:
    """The processes that read are killed while the checkpoint is loaded."""
    load = resume.dist_checkpointing.load

    def kill_and_load(*arguments, **named):
        kill_readers()
        return load(*arguments, **named)

    resume.dist_checkpointing.load = kill_and_load


def readers_killed_after_step(iteration: int) -> None:
    """The processes that read are killed before the next step asks them for anything."""
    after_step(iteration, kill_readers)


def kill_readers() -> None:
    """SIGKILL for every process that this one started, and time for the signal of that to come."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    time.sleep(1)


def another_folder() -> None:
    """Under the output's path this rank finds another folder, as on a node with a disk of its own. A mock."""
    stock = resume._check_seen
    resume._check_seen = lambda path: stock(path.parent / "of another node" / path.name)


def sample_unreadable(count: int) -> None:
    """This rank's processes cannot read the `count`th sample that they come upon."""
    stock, calls = LlavaTaskEncoder.preencode_sample, itertools.count(1)

    @functools.wraps(stock)
    def preencode(self, sample):
        if next(calls) == count:
            raise OSError("Stale file handle")
        return stock(self, sample)

    LlavaTaskEncoder.preencode_sample = preencode


def losses(output: Path) -> dict[int, float]:
    """The loss of each iteration; of an iteration that was done again, the last."""
    lines = [json.loads(line) for line in (output / "log" / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line["lm loss"] for line in lines}


def weights(output: Path) -> dict[str, str]:
    """The sha256 of the last checkpoint's files of tensors: weights and optimizer states."""
    folder = checkpoint_folder(output / "checkpoint")
    checksums.check(folder)
    return {name: digest for name, digest in checksums.read(folder).items() if name.endswith(".distcp")}
