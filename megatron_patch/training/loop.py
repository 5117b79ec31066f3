"""A whole training run on one page."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_patch.config.train import Config
from megatron_patch.conversion.companions import copy_companions
from megatron_patch.conversion.plan import load_rank
from megatron_patch.data import position, readers
from megatron_patch.data.loader import reading, resumed_loader, save_position, train_loader, valid_loader
from megatron_patch.data.mock import BatchLoader
from megatron_patch.data.processor import write_processor
from megatron_patch.families.fused_names import to_transformer_engine_name
from megatron_patch.families.llava import read_config
from megatron_patch.families.sizes import Llava
from megatron_patch.families.stages import Stage
from megatron_patch.model import groups
from megatron_patch.model.llava import LlavaModel
from megatron_patch.model.specs import uses_transformer_engine
from megatron_patch.training import resume
from megatron_patch.training.captions import captioner, evaluating
from megatron_patch.training.log import logger
from megatron_patch.training.metrics import Metrics
from megatron_patch.training.optimizer import build_optimizer, build_scheduler, gather_weights, wrap
from megatron_patch.training.resume import Progress
from megatron_patch.training.saving import Saver
from megatron_patch.training.step import Totals, batch_runner, train_step
from megatron_patch.training.stopping import Stop
from megatron_patch.training.totals import Unlearned


def train(config: Config) -> int:
    """Train on this process and the others that torchrun started, from the beginning or from the last checkpoint.

    Returns the exit code: 0, or 128 + the number of the signal that ended the run, which was saved before.
    """
    stop = Stop(config.training.exit_duration_in_mins)
    llava = read_config(config.model.description)
    checkpoint = resume.find(config)
    readers.hurry_when(stop.is_asked)
    with open_data(config, llava, checkpoint) as loader, reading(loader) as batches:  # while the model is built
        chunks, wrapped, optimizer, progress = start_or_resume(config, llava, checkpoint)
        scheduler = build_scheduler(optimizer, config, progress.iteration)
        run_batch, caption = batch_runner(config, llava), captioner(config, llava)
        world_size, is_writer = dist.get_world_size(), dist.get_rank() == 0
        metrics = Metrics(
            config, llava, first_iteration=progress.iteration + 1, world_size=world_size, is_writer=is_writer
        )
        saver = Saver(config, chunks, optimizer)
        unlearned = Unlearned(len(config.model.frozen) == 2)  # the projector alone is trained
        if progress.iteration >= config.training.train_iters:
            logger.info(
                f"nothing to do: {progress.iteration} iterations are done, and --train-iters asks for "
                f"{config.training.train_iters}"
            )

        for iteration in range(progress.iteration + 1, config.training.train_iters + 1):
            scheduler.step(1)
            step = train_step(wrapped, optimizer, batches, run_batch)
            progress = Progress(iteration, progress.consumed_samples + step.totals.num_samples)
            unlearned.check(iteration, step.totals)
            metrics.log(iteration, step, optimizer.param_groups[0]["lr"], progress.consumed_samples)

            stops = stop.due()
            if config.validates and not stops and is_due(iteration, config.training.eval_interval, config):
                metrics.log_validation(iteration, validate(config, llava, wrapped, run_batch))
                metrics.log_captions(iteration, caption(wrapped))
            saver.poll()
            if stops or is_due(iteration, config.checkpoint.save_interval, config):
                metrics.flush()
                gather_weights(wrapped, config)
                saver.save(progress, save_position(loader) if writes_position(config) else None)
            if stops:
                break
        saver.wait()
        metrics.flush()
        if stop.reason:
            logger.info(
                f"stopped by {stop.reason} after iteration {progress.iteration}; the same command goes on from there"
            )
    return stop.exit_code


def start_or_resume(
    config: Config, llava: Llava, checkpoint: Path | None = None
) -> tuple[list[LlavaModel], list[DistributedDataParallel], MegatronOptimizer, Progress]:
    """Model and optimizer with the weights of `checkpoint`, one that `resume.find` gave, or of the pretrained one."""
    resume.agree(resume.remove_partial, config.checkpoint.folder, rank=0)
    chunks = build_model(config, llava)
    if checkpoint is None and config.model.pretrained_checkpoint is not None:
        for chunk in chunks:
            load_pretrained(config, llava, chunk)
        logger.info(f"loaded the weights of {config.model.pretrained_checkpoint}")
    # After the weights: the optimizer takes its fp32 copies of them when it is built.
    wrapped = wrap(chunks, config)
    optimizer = build_optimizer(wrapped, config, llava)
    progress = Progress()
    if checkpoint is not None:
        progress = resume.load(checkpoint, chunks, optimizer)
        logger.info(f"resumed from {checkpoint} at iteration {progress.iteration}")
    if dist.get_rank() == 0:
        # Beside the weights, so that a checkpoint can be exported without the folder that it came from.
        copy_companions(config.model.description, config.checkpoint.folder)
        write_processor(config, llava.language.family.name, config.checkpoint.folder)
    return chunks, wrapped, optimizer, progress


def build_model(config: Config, llava: Llava) -> list[LlavaModel]:
    """This rank's part of the model: one chunk, or one for each of its virtual stages."""
    chunks = []
    count = config.parallel.virtual_pipeline_model_parallel_size
    for index in range(count):
        vp_stage = index if count > 1 else None
        chunk = LlavaModel(
            config,
            llava,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        chunks.append(chunk.to(groups.device()))
    return chunks


def load_pretrained(config: Config, llava: Llava, chunk: LlavaModel) -> None:
    """Put this chunk's part of the pretrained checkpoint, saved at any TP and PP, into it."""
    first_layer = get_transformer_layer_offset(chunk.config, chunk.vp_stage)
    layers = range(first_layer, first_layer + len(chunk.language_model.decoder.layers))
    assert config.model.pretrained_checkpoint is not None, "which has the weights"
    weights = load_rank(
        config.model.pretrained_checkpoint,
        llava,
        Stage(layers, chunk.pre_process, chunk.post_process),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=config.parallel.tensor_model_parallel_size,
    )
    if uses_transformer_engine(config.model):
        weights = {to_transformer_engine_name(name): tensor for name, tensor in weights.items()}
    missing, unexpected = chunk.load_state_dict(weights, strict=False)
    wrong = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
    if wrong:
        raise ValueError(f"{config.model.pretrained_checkpoint}: {wrong[0]} and {len(wrong) - 1} more do not match")


@contextlib.contextmanager
def open_data(config: Config, llava: Llava, checkpoint: Path | None) -> Iterator[BatchLoader | None]:
    """The training data from where `checkpoint` left it; None on the ranks that do not read. Collective.

    Its readers have begun, before this rank waits for others: a thread that communicates is no good company to a fork.
    """
    loaders: list[BatchLoader | None] = []
    try:
        resume.agree(lambda: loaders.append(begin_to_read(config, llava, checkpoint)))
        yield loaders[0]
    finally:
        for loader in loaders:
            if loader is not None:
                loader.close()


def begin_to_read(config: Config, llava: Llava, checkpoint: Path | None) -> BatchLoader | None:
    """This rank's part of it."""
    if not reads_data(config):
        return None
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    ahead = 0
    if config.validates:
        # Raises now what would stop the first validation.
        ahead += valid_loader(config, llava, rank=rank, world_size=size).shared_memory
    if checkpoint is None:
        loader = train_loader(config, llava, rank=rank, world_size=size)
    else:

        def positions(rank: int) -> dict[str, Any]:
            return resume.read_position(checkpoint, rank, position.load)

        loader = resumed_loader(config, llava, positions, rank=rank, world_size=size)
    group = config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size
    readers.check_room(ahead + loader.shared_memory, max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // group))
    loader.begin()
    return loader


def validate(
    config: Config, llava: Llava, chunks: list[DistributedDataParallel], run_batch: Callable[..., Totals]
) -> Totals:
    """The loss on the first samples of the val split: every validation sees the same."""
    loader = None
    if reads_data(config):
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        loader = valid_loader(config, llava, rank=rank, world_size=size)
    with reading(loader) as batches, evaluating(chunks):
        totals = [run_batch(chunks, batches, forward_only=True) for _ in range(config.training.eval_iters)]
    return Totals.mean(totals)


def is_due(iteration: int, interval: int, config: Config) -> bool:
    """Whether something that happens every `interval` iterations, and at the end, happens after this one."""
    return iteration % interval == 0 or iteration == config.training.train_iters


def reads_data(config: Config) -> bool:
    """Whether this rank reads samples: the first of those that share layers and sequences, on stages that need them.

    Those are the first, for text and images, and the last, for labels; where samples are packed every stage needs to
    know where they begin.
    """
    at_an_end = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    return (at_an_end or config.data.packs) and parallel_state.get_tensor_and_context_parallel_group().rank() == 0


def writes_position(config: Config) -> bool:
    """Whether this rank saves the place in the data of its data-parallel rank."""
    return reads_data(config) and parallel_state.is_pipeline_first_stage()
