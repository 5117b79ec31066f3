"""One training step: a global batch through megatron.core's schedule, then the optimizer."""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_patch.config.train import Config
from megatron_patch.data.images import normalize
from megatron_patch.data.preprocessor import read_image_settings
from megatron_patch.data.task_encoder import Batch
from megatron_patch.families.sizes import Llava
from megatron_patch.model import groups
from megatron_patch.model.llava import DTYPES, LlavaModel
from megatron_patch.model.specs import FP8_MULTIPLE, uses_transformer_engine
from megatron_patch.training.batch import (
    count,
    find_borders,
    packed_seq_params,
    pad,
    padded_length,
    pixels_to_device,
    place_images,
    place_labels,
    shard_sequence,
    to_device,
)
from megatron_patch.training.feed import Feed
from megatron_patch.training.params_norm import params_norm
from megatron_patch.training.totals import Done, Totals, add_up, report_spike, to_host

Schedule = Callable[..., list[dict[str, Tensor]]]


@dataclass(frozen=True)
class Step:
    """What a training step reports."""

    totals: Totals
    grad_norm: float | None
    """None for a step that was left out."""
    params_norm: float
    """Of the weights that the loss was computed with."""
    loss_scale: float
    """What fp16 multiplied the loss with; 1 for other types."""
    seconds: float


def train_step(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: Iterator[Batch],
    run: Callable[..., Totals],
) -> Step:
    """Compute one global batch's gradients and let the optimizer step.

    `chunks`: this rank's part of the model, several with virtual stages. `run` is what `batch_runner` made. Raises
    FloatingPointError when the loss or the gradients are not finite; the weights of this step must not be saved then.
    """
    start = time.perf_counter()
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    totals = run(chunks, batches, forward_only=False)
    loss_scale = optimizer.get_loss_scale().item()
    weights_norm = params_norm(chunks)  # here, where they are whole also when they are gathered in the forward pass
    stepped, grad_norm, _ = optimizer.step()
    if not stepped:
        grad_norm = None  # fp16's gradients overflowed: the weights stay, the scale is lowered
    elif not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradients' norm is {grad_norm}; expected a number")
    return Step(
        totals=totals,
        grad_norm=grad_norm,
        params_norm=weights_norm,
        loss_scale=loss_scale,
        seconds=time.perf_counter() - start,
    )


def batch_runner(config: Config, llava: Llava) -> Callable[..., Totals]:
    """A function (chunks, batches, forward_only) -> Totals that takes one global batch through the pipeline.

    It raises FloatingPointError that names the samples of a micro batch whose loss is NaN or infinite, and ValueError
    when pipeline stages read different samples, on all ranks.
    """
    num_micro_batches = config.data.num_micro_batches(config.parallel, dist.get_world_size())
    multiple = FP8_MULTIPLE if config.model.precision == "fp8" else 1
    prepare = _preparer(config, llava, multiple)
    schedule: Schedule = get_forward_backward_func()
    stages = config.parallel.pipeline_model_parallel_size
    num_reading = stages if config.data.packs else min(stages, 2)
    done: list[Done] = []  # the micro batches that came to this rank
    usual: deque[float] = deque(maxlen=20)  # losses of the last iterations

    def takes(part: LlavaModel) -> bool:
        return part.pre_process or part.post_process or config.data.packs

    def forward_step(
        length: int | None, batches: Iterator[Batch], chunk: DistributedDataParallel
    ) -> tuple[Tensor, Callable]:
        """One micro batch through one (virtual) stage: its output, and what makes a loss of that."""
        part = unwrap_model(chunk)
        if not takes(part):
            return chunk(), _no_losses
        batch = next(batches)
        inputs, counts = prepare(batch, part, length)
        done.append(Done(batch.keys, counts))
        return chunk(**inputs), functools.partial(_sum_losses, counts["num_labels"])

    def run(chunks: list[DistributedDataParallel], batches: Iterator[Batch], forward_only: bool) -> Totals:
        """All micro batches of an iteration, on megatron.core's schedule."""
        done.clear()
        parts = [unwrap_model(chunk) for chunk in chunks]
        feed = Feed(
            batches,
            num_micro_batches,
            groups.host_groups(),
            takes=any(map(takes, parts)),
            takes_pixels=any(part.pre_process for part in parts),
            device=groups.device(),
        )
        with feed.reading() as longest:
            length = longest and padded_length(longest, config.parallel, multiple)
            reports = schedule(
                forward_step_func=functools.partial(forward_step, length),
                # Only one chunk of a rank takes batches: the first of the pipeline, or the last.
                data_iterator=[feed] * len(chunks) if len(chunks) > 1 else feed,
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=num_micro_batches,
                seq_length=length or config.model.decoder_seq_length,  # of no account without stages
                micro_batch_size=config.data.micro_batch_size,
                forward_only=forward_only,
            )
        losses = to_host(reports)
        total = add_up(done, losses, feed.seconds, num_reading)
        if not forward_only:
            report_spike(total.loss, usual, done, losses)
            usual.append(total.loss)
        return total

    return run


def _preparer(
    config: Config, llava: Llava, multiple: int
) -> Callable[[Batch, LlavaModel, int | None], tuple[dict[str, Any], dict[str, int]]]:
    """A function (batch, stage, length) -> (what its forward takes, on the device; what the last stage counts).

    The batch is padded to `length`, or else to the next that ranks can share in multiples of `multiple`.
    """
    parallel, device = config.parallel, groups.device()
    image, dtype = read_image_settings(config.model.description), DTYPES[config.model.precision]
    # Transformer Engine wants borders on the device; megatron.core's own layers would wait for them there.
    borders_on_device = config.data.packs and uses_transformer_engine(config.model)

    def prepare(batch: Batch, part: LlavaModel, length: int | None) -> tuple[dict[str, Any], dict[str, int]]:
        """What the stage `part` takes of a batch, and what is counted of it."""
        batch = pad(batch, length or padded_length(batch.labels.shape[1], parallel, multiple))
        text = shard_sequence(batch, llava.image_token_id, parallel)
        labels = place_labels(text)
        tensors = {
            **(place_images(text, parallel) if part.pre_process else {}),
            **(labels if part.post_process else {}),
            **({"borders": find_borders(batch.segment_lengths)} if borders_on_device and batch.segment_lengths else {}),
        }
        inputs: dict[str, Any] = to_device(tensors, device)
        inputs["packed_seq_params"] = packed_seq_params(batch.segment_lengths, inputs.pop("borders", None))
        if part.pre_process:
            inputs["pixel_values"] = normalize(pixels_to_device(batch.pixels, device), image.mean, image.std, dtype)
        return inputs, count(batch, len(labels["wanted"]))

    return prepare


def _no_losses(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What a stage without labels would report; the schedules ask the last one only."""
    raise AssertionError("losses are the last stage's")


def _sum_losses(num_labels: int, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """megatron.core's loss function on the last stage: (sum, number of labels, what is reported).

    The number stays on the CPU: what megatron.core adds it to on a GPU takes it from there without waiting.
    """
    total = losses.sum()
    return total, torch.tensor(num_labels, dtype=torch.int), {"loss": total.detach()}
