"""Tokens per second of a training step: ours, and transformers' LLaVA in a plain PyTorch loop.

    python benchmarks/train.py [--size 100M] [--stages projector,everything] [--rounds 3] [--device cpu]

The same weights, batches and settings in one process, one contestant after the other, round by round, after two passes
over all batches that are not measured; medians of all measured steps. Images have 336 pixels (576 patches), captions
LLaVA-Pretrain's length. The losses are printed, which must be equal, and what each contestant computes. On a GPU also
the share of its peak, and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from work import TOLERANCE, count_flops, count_tokens, figures, largest_difference, mean_work, peak_tflops

from megatron_patch.config.train import Config
from megatron_patch.families.llava import read_config

if TYPE_CHECKING:
    from inputs import Batch
    from timing import Result

STAGES = {"projector": True, "everything": False}
"""What trains: whether language model and tower are frozen."""


def main() -> int:
    """Measure, and print a table for each stage; 1 when losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["7B", "100M", "tiny"], default="100M", help="of the whole model")
    parser.add_argument("--stages", default=",".join(STAGES), help="what trains, separated by commas")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="of each round; the first is not measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="a file to which a line of JSON per contestant is appended")
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
    from contest import contest
    from inputs import machine, make_batch, make_config, write_description

    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise SystemExit("error: --device cuda: torch sees no GPU; use cpu")
    precision = options.precision or ("bf16" if has_gpu else "fp32")
    batches = [make_batch(options.size, options.micro_batch_size, seed) for seed in range(options.steps)]
    agree = True
    for stage in options.stages.split(","):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            write_description(Path(folder), options.size)
            config = make_config(Path(folder), STAGES[stage], precision, batches)
            print(f"{options.size}, {stage} trains, {precision}: {machine()}; load average {os.getloadavg()[0]:.1f}")
            results = contest(config, batches, options.rounds)
            agree = report(config, batches[1:], results, peak_tflops(machine(), precision)) and agree
            if options.json is not None:
                about = {"machine": machine(), "size": options.size, "stage": stage, "precision": precision}
                write_rows(options.json, about, config, batches[1:], results)
    return agree


def write_rows(path: Path, about: dict, config: Config, batches: list[Batch], results: dict[str, Result]) -> None:
    """Append a line of JSON for each contestant."""
    with path.open("a") as file:
        for name, result in results.items():
            found = {"problem": result.problem} if result.problem else figures(name, config, batches, result)
            file.write(json.dumps({**about, "row": name, **found}) + "\n")


def report(config: Config, batches: list[Batch], results: dict[str, Result], peak: float | None) -> bool:
    """Print the tables of one stage, whose measured steps were on `batches`; whether the losses agree."""
    tokens = statistics.mean(count_tokens(batch) for batch in batches)
    labels = mean_work(batches).num_labels
    print(f"{tokens:.0f} tokens, {labels} of them labels, per step; load average {os.getloadavg()[0]:.1f}\n")
    measured = {name: result for name, result in results.items() if not result.problem}
    for name, result in results.items():
        if result.problem:
            print(f"{name}: {result.problem}")
    if not measured:
        return True  # nothing was compared
    report_speed(config, batches, measured, peak)
    report_operations(config, batches, list(measured))
    print(f"\n{'losses':26}")
    for name, result in measured.items():
        print(f"{name:26}" + " ".join(f"{loss:.6f}" for loss in result.losses))
    largest, allowed = largest_difference([r.losses for r in measured.values()]), TOLERANCE[config.model.precision]
    print(f"largest difference {largest:.1e}, allowed {allowed:g}\n", flush=True)
    return largest <= allowed


def report_speed(config: Config, batches: list[Batch], results: dict[str, Result], peak: float | None) -> None:
    """A line for each contestant; on a GPU without CPU seconds: there a thread spins while it waits."""
    on_cpu = not any(result.device_seconds for result in results.values())
    head = f"{'':26}{'s/step':>9}{'tokens/s':>10}{'ratio':>7}{'TFLOP/s':>9}"
    print(head + (f"{'CPU s':>9}{'ratio':>7}" if on_cpu else "") + "   each step's s")
    plain = next(iter(results.values()))
    for name, result in results.items():
        found = figures(name, config, batches, result)
        row = f"{name:26}{result.median():9.3f}{found['tokens_per_second']:10.0f}"
        row += f"{plain.median() / result.median():7.2f}{found['tflops']:9.3g}"
        if on_cpu:
            cpu = statistics.median(result.cpu_seconds)
            row += f"{cpu:9.3f}{statistics.median(plain.cpu_seconds) / cpu:7.2f}"
        row += "   " + " ".join(f"{step:.3g}" for step in result.device_seconds or result.seconds)
        if result.peak_bytes:
            row += f"   {found['peak_gb']:.2f} GB"
            row += f" (plan: {found['plan_gb']:.2f})" if "plan_gb" in found else ""
        print(row + (f", {found['tflops'] / peak:.1%} of the peak" if peak else ""))


def report_operations(config: Config, batches: list[Batch], names: list[str]) -> None:
    """What each contestant computes, and where."""
    llava, work = read_config(config.model.description), mean_work(batches)
    flops = {name: count_flops(name, llava, config.model, work) for name in names}
    print(f"\n{'1e9 operations per step':26}" + "".join(f"{name:>26}" for name in names))
    totals = {name: sum(parts.values()) for name, parts in flops.items()}
    for part in flops[names[0]]:
        shares = (f"{flops[name][part] / 1e9:.1f} ({flops[name][part] / totals[name]:.1%})" for name in names)
        print(f"{part:26}" + "".join(f"{share:>26}" for share in shares))
    print(f"{'all':26}" + "".join(f"{total / 1e9:26.1f}" for total in totals.values()))


if __name__ == "__main__":
    sys.exit(main())
