"""What a global batch gave, added up over all ranks, and what is wrong with it: NaN, spikes, different samples."""

from __future__ import annotations

import json
import math
import statistics
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_patch.estimate.flops import Work
from megatron_patch.model import groups
from megatron_patch.training.log import logger

MAX_UNLEARNED = 20
"""Iterations without an image, one after another, that end a run which trains the projector alone."""
SPIKE = 10
"""A loss so many times the median of the last 20 is reported."""
DIFFERENT_SAMPLES = (
    "pipeline stages read different samples; a rank leaves out what it cannot read, and its log names it; the same "
    "command goes on from the last checkpoint"
)


@dataclass(frozen=True, kw_only=True)
class Totals(Work):
    """What one global batch gave, over all ranks and micro batches."""

    loss: float
    """Mean loss of the labels."""
    num_samples: int
    num_tokens: int
    """Positions up to the last label of every sample: the padding after it is not counted."""
    data_seconds: float = field(compare=False)
    """How long the rank that waited longest for its micro batches waited for them."""
    num_truncated: int = 0
    """Samples that were longer than --decoder-seq-length and lost their end."""

    @staticmethod
    def mean(totals: list[Totals]) -> Totals:
        """Several global batches as one."""
        sums = {part.name: sum(getattr(total, part.name) for total in totals) for part in fields(Totals)}
        loss = sum(total.loss * total.num_labels for total in totals) / max(sums["num_labels"], 1)
        values: dict[str, Any] = {**sums, "loss": loss}
        return Totals(**values)


@dataclass(frozen=True)
class Done:
    """A micro batch that this rank took part in."""

    keys: list[str]
    """Of its samples."""
    counts: dict[str, int]
    """What the last stage counts, by its name in `Totals`."""


class Unlearned:
    """Watches for global batches of which nothing can be learned: without images, where only the projector is."""

    def __init__(self, trains_projector_alone: bool) -> None:
        self.trains_projector_alone = trains_projector_alone
        self.count = 0
        self.said = False

    def check(self, iteration: int, totals: Totals) -> None:
        """Take in an iteration. Says so once; raises ValueError when `MAX_UNLEARNED` of them follow each other."""
        if not self.trains_projector_alone or totals.num_images:
            self.count = 0
            return
        self.count += 1
        why = (
            f"iteration {iteration}: none of its {totals.num_samples} samples has an image, and only the projector is "
            f"trained, so that the gradients are 0 and nothing is learned"
        )
        if self.count == MAX_UNLEARNED:
            raise ValueError(
                f"{why}, as in the {MAX_UNLEARNED - 1} before it; give data with images, or --freeze-lm false"
            )
        if not self.said:
            logger.warning(why)
            self.said = True


COUNTS = ("num_labels", "num_samples", "num_tokens", "num_positions", "num_pairs", "num_images", "num_truncated")
"""What is counted in each micro batch, by its name in `Totals`."""


def add_up(done: list[Done], losses: list[float], data_seconds: float, num_reading: int) -> Totals:
    """The totals of all ranks, on every rank.

    `done`: the micro batches that came to this rank; `losses`: the sum of each one's, on the last stage; `num_reading`:
    stages that read. Raises on all ranks alike: FloatingPointError for a loss that is NaN or infinite, which names
    samples, and ValueError when stages read different samples.
    """
    sums = [0.0] * (1 + len(COUNTS))
    # Tensor-parallel ranks hold the same losses: one of them speaks.
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        sums = [sum(losses), *(sum(batch.counts[name] for batch in done) for name in COUNTS)]
    keys = [batch.keys for batch in done]
    # Reduced before anything is raised: ranks that wait for one that raised alone would wait until their time is up.
    totals = torch.tensor([*sums, _difference(keys, num_reading)], dtype=torch.float64, device=groups.device())
    dist.all_reduce(totals)
    longest = torch.tensor(data_seconds, dtype=torch.float64, device=groups.device())
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    loss, *counts, difference = totals.tolist()
    if not math.isfinite(loss):
        _raise_not_finite(keys, losses)
    if difference:
        _raise_different(keys)
    counts = dict(zip(COUNTS, map(int, counts), strict=True))
    return Totals(loss=loss / max(counts["num_labels"], 1), data_seconds=longest.item(), **counts)


def to_host(reports: list[dict[str, Tensor]]) -> list[float]:
    """The sums of losses that the schedule collected, in one transfer. Only the last stage has any."""
    return torch.stack([report["loss"] for report in reports]).tolist() if reports else []


def report_spike(loss: float, usual: Iterable[float], done: list[Done], losses: list[float]) -> None:
    """Warn of a global batch's loss far above the usual ones. `done`, `losses`: as in `add_up`.

    The ranks of the last stage name the samples of their highest micro batch, the others say the fact alone.
    """
    before = list(usual)
    if before and loss > SPIKE * statistics.median(before):
        means = [total / max(batch.counts["num_labels"], 1) for total, batch in zip(losses, done, strict=False)]
        highest = f": {max(means):.4f} in samples {', '.join(done[means.index(max(means))].keys)}" if means else ""
        logger.warning(f"loss {loss:.4f} is more than {SPIKE} times the usual one{highest}")


def _raise_not_finite(keys: list[list[str]], losses: list[float]) -> NoReturn:
    """Name the samples of the first micro batch, in the order of ranks, whose loss is not finite."""
    mine = [(samples, loss) for samples, loss in zip(keys, losses, strict=False) if not math.isfinite(loss)]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, mine[:1])
    samples, loss = next(found for of_rank in everything for found in of_rank)
    raise FloatingPointError(f"the loss of samples {', '.join(samples)} is {'NaN' if math.isnan(loss) else loss}")


def _difference(keys: list[list[str]], num_reading: int) -> int:
    """A number that, added up over all ranks, is 0 where the stages of each data-parallel rank read the same samples.

    The first stage gives the others' share of its samples' checksum, and each of them takes its own away.
    """
    if not keys or parallel_state.get_tensor_and_context_parallel_group().rank() > 0:
        return 0
    checksum = zlib.crc32(json.dumps(keys).encode())  # 32 bits, so that fp64 adds them up exactly
    return (num_reading - 1) * checksum if parallel_state.is_pipeline_first_stage() else -checksum


def _raise_different(keys: list[list[str]]) -> NoReturn:
    """Name the first samples that stages have in the place of each other's."""
    mine = (parallel_state.get_data_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank(), keys)
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
