"""One training step: a global batch through megatron.core's schedule, then the optimizer."""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_patch import parallel
from megatron_patch.config import Config, Parallel
from megatron_patch.data.image import normalize, read_image_settings
from megatron_patch.data.task_encoder import Batch
from megatron_patch.data.tokenize import IGNORE
from megatron_patch.estimate.flops import Work
from megatron_patch.model.llava import DTYPES, find_image_rows
from megatron_patch.model.specs import FP8_MULTIPLE, uses_transformer_engine
from megatron_patch.sizes import Llava
from megatron_patch.training.log import logger
from megatron_patch.training.params_norm import params_norm

Schedule = Callable[..., list[dict[str, Tensor]]]
SPIKE = 10
"""A loss so many times the median of the last 20 is reported."""


@dataclass(frozen=True, kw_only=True)
class Totals(Work):
    """What one global batch gave, over all ranks and micro batches."""

    loss: float
    """Sum of the learned tokens' losses / their number."""
    num_samples: int
    num_tokens: int
    """Positions up to the last learned one of every sample: the padding behind it is not counted."""
    data_seconds: float = field(compare=False)
    """How long the rank that waited longest for its micro batches waited for them."""
    num_cut: int = 0
    """Samples that were longer than --decoder-seq-length and lost their end."""

    @staticmethod
    def mean(totals: list[Totals]) -> Totals:
        """Several global batches as one."""
        sums = {part.name: sum(getattr(total, part.name) for total in totals) for part in fields(Totals)}
        loss = sum(total.loss * total.num_labels for total in totals) / max(sums["num_labels"], 1)
        return Totals(**{**sums, "loss": loss})


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
    FloatingPointError when the loss or the gradients are no numbers; the weights of this step must not be saved then.
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

    It raises FloatingPointError that names the samples of a micro batch whose loss is no number, and ValueError when
    pipeline stages read different samples.
    """
    dtype = DTYPES[config.model.precision]
    num_micro_batches = config.data.num_micro_batches(config.parallel, dist.get_world_size())
    multiple = FP8_MULTIPLE if config.model.precision == "fp8" else 1
    image = read_image_settings(config.model.description)
    # Transformer Engine wants them on the device; megatron.core's own layers would wait for them there.
    borders_device = parallel.device() if uses_transformer_engine(config.model) else torch.device("cpu")
    schedule: Schedule = get_forward_backward_func()
    stages = config.parallel.pipeline_model_parallel_size
    num_reading = stages if config.data.packs else min(stages, 2)
    read: list[list[str]] = []  # keys of the micro batches that came to this rank
    usual: deque[float] = deque(maxlen=20)  # losses of the last iterations

    def forward_step(batches: Iterator[Batch], chunk: DistributedDataParallel) -> tuple[Tensor, Callable]:
        part = unwrap_model(chunk)
        if not (part.pre_process or part.post_process or config.data.packs):
            return chunk(None, None, None, None), _no_losses
        batch = _next_batch(batches)
        read.append(batch.keys)
        text = cut_text(batch, llava.image_token_id, config.parallel, multiple)
        if not part.pre_process and part.received_length != text["labels"].shape[1]:
            raise ValueError(f"{DIFFERENT_SAMPLES} (this stage: {', '.join(batch.keys)})")
        input_ids = image_rows = pixel_values = labels = None
        if part.pre_process:
            input_ids = text["input_ids"].to(parallel.device(), non_blocking=True)
            image_rows = text["image_rows"].to(parallel.device(), non_blocking=True)
            pixels = batch.pixels.to(parallel.device(), non_blocking=True)
            pixel_values = normalize(pixels, image.mean, image.std, dtype)  # [n, 3, h, w]
        if part.post_process:
            labels = text["labels"].to(parallel.device(), non_blocking=True)
        borders = packed_seq_params(batch, borders_device)
        return chunk(input_ids, image_rows, pixel_values, labels, borders), functools.partial(_sum_losses, batch)

    def run(chunks: list[DistributedDataParallel], batches: Iterator[Batch], forward_only: bool) -> Totals:
        read.clear()
        batches = TimedIterator(batches)
        reports = schedule(
            forward_step_func=forward_step,
            # Only one chunk of a rank takes batches: the first of the pipeline, or the last.
            data_iterator=[batches] * len(chunks) if len(chunks) > 1 else batches,
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=num_micro_batches,
            seq_length=config.model.decoder_seq_length,
            micro_batch_size=config.data.micro_batch_size,
            forward_only=forward_only,
        )
        _check_finite(read, reports)
        totals = _total(reports, batches.seconds, read, num_reading)
        if not forward_only:
            report_spike(totals.loss, usual, read, reports)
            usual.append(totals.loss)
        return totals

    return run


def cut_text(batch: Batch, image_token_id: int, cut: Parallel, multiple: int = 1) -> dict[str, Tensor]:
    """What the model takes of a batch's text on this context-parallel rank: int64 [b, s / CP] each.

    `input_ids`; `image_rows`: the number of the patch, of all the batch's, that lies at a position, -1 for words;
    `labels`. Padded on the right to a length that ranks can share in multiples of `multiple`; each row, or each sample
    of a packed sequence, in zigzag order, as the attention expects.
    """
    image_rows = find_image_rows(batch.input_ids, image_token_id)
    text = {"input_ids": (batch.input_ids, 0), "image_rows": (image_rows, -1), "labels": (batch.labels, IGNORE)}
    padding = -image_rows.shape[1] % (cut.sequence_multiple * multiple)
    padded = {name: F.pad(tensor, (0, padding), value=value) for name, (tensor, value) in text.items()}
    lengths = batch.segment_lengths or [image_rows.shape[1] + padding]
    return {name: _zigzag(tensor, lengths, cut.context_parallel_size) for name, tensor in padded.items()}


def _zigzag(text: Tensor, lengths: list[int], size: int) -> Tensor:
    """This context-parallel rank's two of 2 * size pieces of each segment: [b, s] -> [b, s / size]."""
    if size == 1:
        return text
    rank = parallel_state.get_context_parallel_rank()
    pieces = [segment.chunk(2 * size, dim=1) for segment in text.split(lengths, dim=1)]
    return torch.cat([part for segment in pieces for part in (segment[rank], segment[-1 - rank])], dim=1)


def packed_seq_params(batch: Batch, device: torch.device) -> PackedSeqParams | None:
    """Where the samples of a packed sequence begin and end, before it is cut over ranks; None: it is not packed."""
    if batch.segment_lengths is None:
        return None
    borders = torch.tensor([0, *itertools.accumulate(batch.segment_lengths)], dtype=torch.int32, device=device)
    longest = max(batch.segment_lengths)
    # The padding belongs to the sample before it, so that there is one list of borders.
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=longest, max_seqlen_kv=longest
    )


class TimedIterator:
    """An iterator that adds up how long it was waited for."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.seconds = 0.0

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - start
        return batch


def _next_batch(batches: Iterator[Batch]) -> Batch:
    """The next micro batch, read by the first of the tensor- and context-parallel ranks and handed to the others."""
    group = parallel_state.get_tensor_and_context_parallel_group()
    box = [next(batches) if group.rank() == 0 else None]
    if group.size() > 1:
        dist.broadcast_object_list(box, group=group, group_src=0, device=parallel.device())
    return box[0]


def _check_finite(read: list[list[str]], reports: list[dict[str, Tensor]]) -> None:
    """Raise FloatingPointError for the first micro batch whose loss is no number. Only the last stage has reports."""
    for samples, report in zip(read, reports, strict=True) if reports else ():
        if not report["totals"][0].isfinite():
            raise FloatingPointError(f"the loss of samples {', '.join(samples)} is {report['totals'][0].item()}")


def report_spike(loss: float, usual: Iterable[float], keys: list[list[str]], reports: list[dict[str, Tensor]]) -> None:
    """Warn of a global batch's loss far above the usual ones. `keys`, `reports`: of its micro batches on this rank.

    The ranks of the last stage name the samples of their highest micro batch, the others say the fact alone.
    """
    losses = list(usual)
    if losses and loss > SPIKE * statistics.median(losses):
        means = [(report["totals"][0] / report["totals"][1].clamp(min=1)).item() for report in reports]
        highest = f": {max(means):.4f} in samples {', '.join(keys[means.index(max(means))])}" if means else ""
        logger.warning(f"loss {loss:.4f} is more than {SPIKE} times the usual one{highest}")


def _no_losses(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What a stage without labels would report; the schedules ask the last one only."""
    raise AssertionError("losses are the last stage's")


COUNTS = ("num_labels", "num_samples", "num_tokens", "num_positions", "num_pairs", "num_pictures", "num_cut")
"""What the last stage counts, by its name in `Totals`."""


def _sum_losses(batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """megatron.core's loss function on the last stage: (sum, number of learned tokens, what is reported)."""
    total = losses.sum()
    is_label = batch.labels != IGNORE  # [b, s]
    size, length = is_label.shape
    lengths = batch.segment_lengths or [length]
    # Positions behind the last label of each row or segment.
    padding = sum(int(part.flip(1).int().argmax(dim=1).sum()) for part in is_label.split(lengths, dim=1))
    # Context-parallel ranks have losses of their own and samples in common.
    is_first = parallel_state.get_context_parallel_rank() == 0
    num_pairs = size * sum(length**2 for length in lengths)
    of_samples = (len(batch.keys), size * length - padding, size * length, num_pairs, len(batch.pixels), batch.num_cut)
    counts = [losses.numel(), *(is_first * count for count in of_samples)]
    report = torch.cat([total.detach().double().view(1), torch.tensor(counts, device=losses.device)])  # fp64
    return total, report[1].int(), {"totals": report}


def _total(reports: list[dict[str, Tensor]], data_seconds: float, read: list[list[str]], num_reading: int) -> Totals:
    """Add up what the last stages' reports say, on every rank. Raises ValueError when stages read different samples.

    `read`: keys of the micro batches that came to this rank; `num_reading`: stages that read.
    """
    totals = torch.zeros(1 + len(COUNTS) + 1, dtype=torch.float64, device=parallel.device())
    # Tensor-parallel ranks hold the same report: one of them speaks.
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        for report in reports:
            totals[:-1] += report["totals"]
    totals[-1] = _difference(read, num_reading)
    dist.all_reduce(totals)
    longest = torch.tensor(data_seconds, dtype=torch.float64, device=parallel.device())
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    loss, *counts, difference = totals.tolist()
    if difference:
        _raise_different(read)
    counts = dict(zip(COUNTS, map(int, counts), strict=True))
    return Totals(loss=loss / max(counts["num_labels"], 1), data_seconds=longest.item(), **counts)


DIFFERENT_SAMPLES = (
    "pipeline stages read different samples; a rank leaves out what it cannot read, and its log names it; the same "
    "command goes on from the last checkpoint"
)


def _difference(read: list[list[str]], num_reading: int) -> int:
    """A number that, added up over all ranks, is 0 where the stages of each data-parallel rank read the same samples.

    The first stage gives the others' share of its samples' checksum, and each of them takes its own away.
    """
    if not read or parallel_state.get_tensor_and_context_parallel_group().rank() > 0:
        return 0
    checksum = zlib.crc32(json.dumps(read).encode())  # 32 bits, so that fp64 adds them up exactly
    return (num_reading - 1) * checksum if parallel_state.is_pipeline_first_stage() else -checksum


def _raise_different(read: list[list[str]]) -> NoReturn:
    """Name the first samples that stages have in the place of each other's."""
    mine = (parallel_state.get_data_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank(), read)
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, mine)
    first_stages = {replica: samples for replica, stage, samples in everything if stage == 0}
    for replica, stage, samples in everything:
        for expected, found in zip(first_stages[replica], samples, strict=False):  # stages between may not read
            if found != expected:
                raise ValueError(
                    f"{DIFFERENT_SAMPLES} (stage 0: {', '.join(expected)}; stage {stage}: {', '.join(found)})"
                )
    raise AssertionError("checksums differ and samples do not")
