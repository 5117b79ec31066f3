"""What a training step has to compute, and what it may differ by. Imports nothing heavy."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_patch.config.train import Config, Model
from megatron_patch.estimate.flops import Work, forward_flops, step_flops
from megatron_patch.estimate.memory import plan
from megatron_patch.families.llava import read_config
from megatron_patch.families.sizes import Llava

if TYPE_CHECKING:
    from inputs import Batch
    from timing import Result

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp8": 1e-1}
"""By which losses may differ."""
UNUSED_LAYER = "unused vision layer"
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}
"""bf16 matrix products without sparsity, by NVIDIA's data sheets of the SXM modules."""


def peak_tflops(machine: str, precision: str) -> float | None:
    """What the machine's GPU can do at most, where that is known."""
    known = [peak for name, peak in PEAK_TFLOPS.items() if name in machine]
    return known[0] if known and precision != "fp32" else None


def mean_work(batches: list[Batch]) -> Work:
    """What a step of these has to do, in the mean."""
    return Work(
        num_positions=round(statistics.mean(batch.labels.numel() for batch in batches)),
        num_pairs=round(statistics.mean(map(count_pairs, batches))),
        num_images=round(statistics.mean(len(batch.pixels) for batch in batches)),
        num_labels=round(statistics.mean(int((batch.labels >= 0).sum()) for batch in batches)),
    )


def count_pairs(batch: Batch) -> int:
    """Pairs of positions that attention compares: within a row, or within a packed sample."""
    rows, length = batch.labels.shape
    return rows * sum(segment**2 for segment in batch.segment_lengths or [length])


def count_tokens(batch: Batch) -> int:
    """Positions up to the last label of each sample: padding is no token."""
    segments = (batch.labels >= 0).split(batch.segment_lengths or batch.labels.shape[1], dim=1)
    return sum(1 + int(row.nonzero().max()) for segment in segments for row in segment)


def count_flops(name: str, llava: Llava, model: Model, work: Work) -> dict[str, float]:
    """Part of the model -> operations of a contestant's step.

    transformers predicts at every position, and computes the tower's last layer, whose output LLaVA does not use.
    """
    if name != "transformers":
        model = replace(model, use_flash_attn="unfused attention" not in name)
        return {**step_flops(llava, model, work), UNUSED_LAYER: 0.0}
    everywhere = replace(work, num_labels=work.num_positions)
    parts = step_flops(llava, model, everywhere)
    layers = forward_flops(llava, work, num_predicted=0, attention_share=0)["vision layers"]
    return {**parts, UNUSED_LAYER: layers / llava.vision.num_layers}


def largest_difference(losses: list[list[float]]) -> float:
    """Between the first contestant's losses and any other's, step by step."""
    first, *others = losses
    return max((abs(a - b) for other in others for a, b in zip(first, other, strict=True)), default=0.0)


def figures(name: str, config: Config, batches: list[Batch], result: Result, micro_batches: int = 1) -> dict[str, Any]:
    """What a contestant's row says: times of a step in ms, rates, GB of the GPU, losses.

    `batches`: of which a step takes `micro_batches`.
    """
    llava = read_config(config.model.description)
    seconds = result.median()
    every = [1000 * second for second in result.device_seconds or result.seconds]
    tokens = micro_batches * statistics.mean(map(count_tokens, batches))
    flops = micro_batches * sum(count_flops(name, llava, config.model, mean_work(batches)).values())
    row: dict[str, Any] = {
        "ms": 1000 * seconds,
        "ms_min": min(every),
        "ms_max": max(every),
        "host_ms": 1000 * statistics.median(result.seconds),
        "steps": len(every),
        "samples_per_second": micro_batches * statistics.mean(len(batch.keys) for batch in batches) / seconds,
        "tokens_per_second": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "losses": result.losses,
    }
    if result.peak_bytes:
        row["peak_gb"] = result.peak_bytes / 1e9
    if name != "transformers":
        row["plan_gb"] = plan(config, llava, world_size=1)[0].total / 1e9
    return row
