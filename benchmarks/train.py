"""Tokens per second of a training step: ours, and transformers' LLaVA in a plain PyTorch loop.

    python benchmarks/train.py [--size 100M] [--stages projector,everything] [--rounds 3] [--device cpu]

The same weights, batches and settings in one process, one contestant after the other, round by round; medians of all
measured steps. Pictures have 336 pixels (576 patches), captions LLaVA-Pretrain's length. The losses are printed, which
must be equal, and what each contestant computes. On a GPU also TFLOP/s, the share of its peak, and memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_patch.config import Config, Model
from megatron_patch.estimate.flops import Work, forward_flops, step_flops
from megatron_patch.estimate.memory import plan
from megatron_patch.families.llava import read_config
from megatron_patch.sizes import Llava

if TYPE_CHECKING:
    from contest import Batch, Result

STAGES = {"projector": True, "everything": False}
"""What trains: whether language model and tower are frozen."""
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""By which losses may differ."""
UNUSED_LAYER = "unused vision layer"
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}
"""bf16 matrix products without sparsity, by NVIDIA's data sheets of the SXM modules."""


def main() -> int:
    """Measure, and print a table for each stage; 1 when losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["7B", "100M", "tiny"], default="100M", help="of the whole model")
    parser.add_argument("--stages", default=",".join(STAGES), help="what trains, separated by commas")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    parser.add_argument("--precision", choices=list(TOLERANCE), help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="of each round; the first is not measured")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for devices
    if unknown := set(options.stages.split(",")) - set(STAGES):
        parser.error(f"--stages {options.stages}: {unknown.pop()!r} is not one of {', '.join(STAGES)}")
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: expected 2 or more, since the first is not measured")
    return 0 if measure(options) else 1


def measure(options: argparse.Namespace) -> bool:
    """Every stage; whether all losses agree."""
    import torch
    from contest import contest, machine, make_batch, make_config, write_description

    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise SystemExit("error: --device cuda: torch sees no GPU; use cpu")
    precision = options.precision or ("bf16" if has_gpu else "fp32")
    batches = [make_batch(options.micro_batch_size, seed) for seed in range(options.steps)]
    agree = True
    for stage in options.stages.split(","):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            write_description(Path(folder), options.size)
            config = make_config(Path(folder), STAGES[stage], precision, batches)
            print(f"{options.size}, {stage} trains, {precision}: {machine()}; load average {os.getloadavg()[0]:.1f}")
            results = contest(config, batches, options.rounds)
            agree = report(config, batches[1:], results, peak_tflops(machine(), precision)) and agree
    return agree


def peak_tflops(machine: str, precision: str) -> float | None:
    """What the machine's GPU can do at most, where that is known."""
    known = [peak for name, peak in PEAK_TFLOPS.items() if name in machine]
    return known[0] if known and precision == "bf16" else None


def report(config: Config, batches: list[Batch], results: dict[str, Result], peak: float | None) -> bool:
    """Print the tables of one stage, whose measured steps were on `batches`; whether the losses agree."""
    work = mean_work(batches)
    tokens = statistics.mean(count_tokens(batch) for batch in batches)
    flops = {name: count_flops(name, read_config(config.model.description), config.model, work) for name in results}
    print(f"{tokens:.0f} tokens, {work.num_labels} of them labels, per step; load average {os.getloadavg()[0]:.1f}\n")
    print(f"{'':26}{'s/step':>9}{'tokens/s':>10}{'ratio':>7}{'TFLOP/s':>9}{'CPU s':>9}{'ratio':>7}   each step's s")
    plain = results["transformers"]
    planned = plan(config, read_config(config.model.description), world_size=1)[0].total
    for name, result in results.items():
        seconds, cpu = statistics.median(result.seconds), statistics.median(result.cpu_seconds)
        ratios = statistics.median(plain.seconds) / seconds, statistics.median(plain.cpu_seconds) / cpu
        rate = sum(flops[name].values()) / seconds / 1e12
        row = f"{name:26}{seconds:9.3f}{tokens / seconds:10.0f}{ratios[0]:7.2f}{rate:9.3g}{cpu:9.3f}{ratios[1]:7.2f}   "
        row += " ".join(f"{step:.3g}" for step in result.seconds)
        if result.peak_bytes:
            row += f"   {result.peak_bytes / 1e9:.2f} GB"
            row += f" (plan: {planned / 1e9:.2f})" if name == "ours" else ""
        print(row + (f", {rate / peak:.1%} of the peak" if peak else ""))

    print(f"\n{'1e9 operations per step':26}" + "".join(f"{name:>26}" for name in results))
    totals = {name: sum(parts.values()) for name, parts in flops.items()}
    for part in flops["transformers"]:
        shares = (f"{flops[name][part] / 1e9:.1f} ({flops[name][part] / totals[name]:.1%})" for name in results)
        print(f"{part:26}" + "".join(f"{share:>26}" for share in shares))
    print(f"{'all':26}" + "".join(f"{total / 1e9:26.1f}" for total in totals.values()))

    print(f"\n{'losses':26}")
    for name, result in results.items():
        print(f"{name:26}" + " ".join(f"{loss:.6f}" for loss in result.losses))
    pairs = (zip(result.losses, plain.losses, strict=True) for result in results.values())
    largest = max(abs(loss - expected) for pair in pairs for loss, expected in pair)
    allowed = TOLERANCE[config.model.precision]
    print(f"largest difference {largest:.1e}, allowed {allowed:g}\n", flush=True)
    return largest <= allowed


def mean_work(batches: list[Batch]) -> Work:
    """What a step of these has to do, in the mean."""
    sizes = [batch.labels.shape for batch in batches]
    return Work(
        num_positions=round(statistics.mean(b * s for b, s in sizes)),
        num_pairs=round(statistics.mean(b * s * s for b, s in sizes)),
        num_pictures=sizes[0][0],
        num_labels=round(statistics.mean(int((batch.labels >= 0).sum()) for batch in batches)),
    )


def count_tokens(batch: Batch) -> int:
    """Positions up to the last label of each sample: padding is no token."""
    return sum(1 + int(row.nonzero().max()) for row in batch.labels >= 0)


def count_flops(name: str, llava: Llava, model: Model, work: Work) -> dict[str, float]:
    """Part of the model -> operations of a contestant's step.

    transformers predicts words at every position, and computes the tower's last layer, whose output LLaVA does not use.
    """
    if name != "transformers":
        return {**step_flops(llava, replace(model, use_flash_attn=name == "ours"), work), UNUSED_LAYER: 0.0}
    everywhere = replace(work, num_labels=work.num_positions)
    parts = step_flops(llava, model, everywhere)
    layers = forward_flops(llava, work, num_predicted=0, attention_share=0)["vision layers"]
    return {**parts, UNUSED_LAYER: layers / llava.vision.num_layers}


if __name__ == "__main__":
    sys.exit(main())
