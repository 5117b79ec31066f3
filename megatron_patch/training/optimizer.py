"""The model wrapped for data parallelism, its optimizer and its learning rate, as megatron.core has them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_patch.config.train import Config
from megatron_patch.estimate.memory import GIB, offload_fraction, plan
from megatron_patch.families.sizes import Llava
from megatron_patch.model import groups
from megatron_patch.model.llava import LlavaModel
from megatron_patch.training.log import logger
from megatron_patch.training.weight_gradients import accumulate_in_place

FIRST_LOSS_SCALE = 2.0**12
"""fp16: what the loss, a sum over tokens, is multiplied with at first. Halved after gradients overflow twice."""
STATE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.uint8}
"""As megatron.core calls them; fp8 are bytes to it."""
LOSS_SCALE_WINDOW = 1000
"""fp16: steps without overflow after which the scale is doubled."""


def wrap(chunks: list[LlavaModel], config: Config) -> list[DistributedDataParallel]:
    """The model in its precision, its gradients in fp32 and reduced over the data-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            ddp_config,
            Float16Module(chunk.config, chunk) if chunk.config.bf16 or chunk.config.fp16 else chunk,
            # The first chunk's gradients are ready last: only those are worth reducing in pieces.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    accumulate_in_place(wrapped)
    if config.parallel.overlap_grad_reduce:
        # Gradients are sent only when the last micro batch has added its own.
        no_syncs = [chunk.no_sync for chunk in wrapped]
        wrapped[0].config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
    return wrapped


def gather_weights(chunks: list[DistributedDataParallel], config: Config) -> None:
    """Make this rank's weights whole after a step: with `overlap_param_gather` that waits for the next forward pass."""
    if config.parallel.overlap_param_gather:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(chunks: list[DistributedDataParallel], config: Config, llava: Llava) -> MegatronOptimizer:
    """Adam with decoupled weight decay, its states in fp32 and, where asked for, sharded over data-parallel ranks."""
    settings, core = config.optimizer, chunks[0].config
    fraction = offloaded_fraction(config, llava)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=core.bf16,
            fp16=core.fp16,
            initial_loss_scale=FIRST_LOSS_SCALE,
            loss_scale_window=LOSS_SCALE_WINDOW,
            params_dtype=core.params_dtype,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            optimizer_cpu_offload=fraction > 0,
            optimizer_offload_fraction=fraction,
            # Has the fp32 copies of 16-bit weights on the CPU too.
            use_precision_aware_optimizer=settings.use_precision_aware_optimizer
            or (fraction > 0 and (core.bf16 or core.fp16)),
            exp_avg_dtype=STATE_DTYPES[settings.exp_avg_dtype],
            exp_avg_sq_dtype=STATE_DTYPES[settings.exp_avg_sq_dtype],
        ),
        chunks,
    )
    fuse(optimizer)
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def fuse(optimizer: MegatronOptimizer) -> None:
    """Have torch's AdamW, which steps where Transformer Engine is missing, step in one kernel, after every load too.

    megatron.core leaves it torch's default. On a GPU that is several kernels for all weights at once, with a temporary
    as large as a state; on the CPU, several passes over each weight.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if isinstance(inner, torch.optim.AdamW):
            _set_fused(inner.param_groups)
            # A loaded state brings the groups of the run that saved it.
            inner.register_load_state_dict_pre_hook(lambda _, state: _set_fused(state["param_groups"]))


def _set_fused(param_groups: list[dict[str, Any]]) -> None:
    for group in param_groups:
        group["fused"] = True


def offloaded_fraction(config: Config, llava: Llava) -> float:
    """Which part of each rank's optimizer states is kept on the CPU: with auto, what the rank with least room asks for.

    To be called when weights and gradients are on the device.
    """
    if config.optimizer.optimizer_offload != "auto":
        return float(config.optimizer.optimizer_offload == "static")
    free = groups.free_memory()
    if free is None:
        logger.info("--optimizer-offload auto: 0% of the optimizer states offloaded, since there is no GPU")
        return 0.0
    memory = plan(config, llava, dist.get_world_size())[parallel_state.get_pipeline_model_parallel_rank()]
    fraction = torch.tensor(offload_fraction(memory, free), device=groups.device())
    dist.all_reduce(fraction, op=dist.ReduceOp.MAX)
    logger.info(
        f"--optimizer-offload auto: {fraction.item():.0%} of the optimizer states offloaded; on this rank "
        f"{free / GIB:.1f} GiB are free, for {memory.optimizer / GIB:.1f} GiB of states and "
        f"{(memory.activations + memory.working) / GIB:.1f} GiB of activations"
    )
    return fraction.item()


def build_scheduler(optimizer: MegatronOptimizer, config: Config, iteration: int) -> OptimizerParamScheduler:
    """The learning rate after `iteration` iterations; `step(1)` before each further one.

    Iteration i of n (from 1) has the rate of step i: a linear warmup, then a cosine that is at its lowest at n.
    It, the weight decay and Adam's own numbers always follow the present settings, also when an optimizer was restored
    that was saved under others.
    """
    settings = config.optimizer
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = settings.lr, settings.min_lr
        group["betas"], group["eps"] = (settings.adam_beta1, settings.adam_beta2), settings.adam_eps
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=config.training.train_iters,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=config.training.train_iters,
        wd_incr_style="constant",
    )
    scheduler.step(iteration)
    return scheduler
