"""The matrix: however the model and the batch are cut, losses and gradient norms are those of one process.

    python -m tests.distributed.matrix [--checkpoint DIR] [--runs projector,everything,bf16] [--only TP2]

prints it for this machine, as `make matrix` does: on its GPUs over NCCL, else on the CPU over gloo. Tests assert it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from megatron_patch.config.train import Config, Parallel
from megatron_patch.families.llava import read_config
from megatron_patch.model import offload
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.optimizer import build_scheduler
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs
from tests.distributed.ranks import run_jobs
from tests.tiny import save_clip, save_mcore, save_mistral

STEPS = 5
MICRO_BATCHES = 4
LEARNING_RATE = 5e-4
PICTURES = ((1, 0), (2, 1), (0, 0), (1, 2))
"""Of the two samples of each micro batch: texts alone and several images are there at every cut."""

RUNS = {
    "projector": {"freeze_lm": True, "freeze_vit": True},
    "everything": {},
    "bf16": {"precision": "bf16"},
}
"""What each case trains: stage 1, all weights, and these in bf16. Compared with one process that does the same."""
TOLERANCE = {"projector": 1e-5, "everything": 1e-5, "bf16": 1e-2}
"""Of the loss, and of the gradient norm relative to one process's."""

Report = list[tuple[float, float]]
"""Loss and gradient norm of each step, as one rank says."""


@dataclass(frozen=True)
class Case:
    """A way to compute the same."""

    name: str
    world_size: int = 1
    cut: Parallel = field(default_factory=Parallel)
    changed: dict = field(default_factory=dict)
    """Other settings, of any part."""


def _cut(
    name: str, world_size: int, *, tp: int = 1, pp: int = 1, cp: int = 1, changed: dict | None = None, **more
) -> Case:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": cp}
    return Case(name, world_size, Parallel(**sizes, **more), changed or {})


ONE = Case("one process")
CASES = (
    _cut("TP2", 2, tp=2, sequence_parallel=False),
    _cut("TP2+SP", 2, tp=2),
    _cut("PP2", 2, pp=2),
    _cut("PP2xVPP2", 2, pp=2, virtual_pipeline_model_parallel_size=2),
    _cut("CP2", 2, cp=2),
    _cut("PP2, offload", 2, pp=2, changed={"recompute": "offload"}),
    _cut("DP2", 2, use_distributed_optimizer=False),
    _cut("DP2+DO", 2),
    _cut("DP2+DO, opt. offload", 2, changed={"optimizer_offload": "static"}),
    _cut("TP2xPP2", 4, tp=2, pp=2, sequence_parallel=False),
    _cut("TP2xPP2+SP", 4, tp=2, pp=2),
    _cut("CP2xTP2+SP", 4, tp=2, cp=2),
    _cut("CP2xPP2", 4, pp=2, cp=2),
    _cut("DP2xCP2+DO", 4, cp=2),
    Case("recompute sel", changed={"recompute": "sel"}),
    Case("recompute full", changed={"recompute": "full"}),
    Case("recompute uniform 2", changed={"recompute": "full", "recompute_num_layers": 2}),
    Case("recompute block 3", changed={"recompute": "full", "recompute_method": "block", "recompute_num_layers": 3}),
    Case("activation offload", changed={"recompute": "offload"}),
    Case("optimizer offload", changed={"optimizer_offload": "static"}),
    Case("unfused attention", changed={"use_flash_attn": False}),
)


def train(config: Config, steps: int) -> Report:
    """A few steps on the same micro batches, on this process and the others."""
    from megatron.core import parallel_state  # which must not be imported before megatron_patch

    llava = read_config(config.model.description)
    _, wrapped, optimizer, _ = start_or_resume(config, llava)
    scheduler = build_scheduler(optimizer, config, 0)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = itertools.cycle(tiny_runs.batches(llava, MICRO_BATCHES, pictures=PICTURES)[rank::size])
    run = batch_runner(config, llava)
    report = []
    with mock.patch.object(offload, "SMALLEST", 0):  # a tiny model's activations are moved too
        for _ in range(steps):
            scheduler.step(1)
            step = train_step(wrapped, optimizer, batches, run)
            report.append((step.totals.loss, step.grad_norm))
    return report


def compute(
    pairs: Iterable[tuple[Case, str]], checkpoint: Path, output: Path, steps: int = STEPS
) -> dict[tuple[str, str], list[Report]]:
    """Train cases in runs, from the same checkpoint; (name of the case, run) -> the ranks' reports.

    All cases must be of one number of processes. `output` gets what a run writes beside checkpoints.
    """
    pairs = list(pairs)
    if not pairs:
        return {}
    (world_size,) = {case.world_size for case, _ in pairs}
    jobs = []
    patches = read_config(checkpoint).vision.num_image_tokens
    usual = {
        "global_batch_size": 2 * MICRO_BATCHES,
        "lr": LEARNING_RATE,
        "decoder_seq_length": patches * max(map(max, PICTURES)) + 64,
    }
    for case, run in pairs:
        settings = {**usual, **RUNS[run], **case.changed}
        config = tiny_runs.config(checkpoint, output, parallel=case.cut, **settings)
        jobs.append((train, case.cut, (config, steps)))
    names = [(case.name, run) for case, run in pairs]
    return dict(zip(names, run_jobs(jobs, world_size), strict=True))


def differences(reports: list[Report], expected: Report) -> tuple[float, float]:
    """The largest of all steps and ranks: of the loss, and of the gradient norm relative to `expected`."""
    pairs = [pair for report in reports for pair in zip(report, expected, strict=True)]
    return (
        max(abs(loss - other) for (loss, _), (other, _) in pairs),
        max(abs(norm - other) / other for (_, norm), (_, other) in pairs),
    )


def main() -> int:
    """Print the table; 1 when a difference is larger than it may be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="Megatron-Core checkpoint; default: a tiny one, made here")
    parser.add_argument("--runs", default=",".join(RUNS), help="what is trained, separated by commas")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    runs = options.runs.split(",")
    if unknown := set(runs) - set(RUNS):
        parser.error(f"--runs {options.runs}: {sorted(unknown)[0]!r} is not one of {', '.join(RUNS)}")
    with tempfile.TemporaryDirectory(prefix="matrix-") as name:
        folder = Path(name)
        with contextlib.redirect_stdout(sys.stderr):
            checkpoint = options.checkpoint or make_checkpoint(folder)
        cases = [case for case in CASES if options.only in case.name]
        return 0 if print_table(cases, checkpoint, folder, runs) else 1


def make_checkpoint(folder: Path) -> Path:
    """The tests' tiny model."""
    return save_mcore(folder, save_mistral(folder / "llm"), save_clip(folder / "clip"))


def print_table(cases: list[Case], checkpoint: Path, folder: Path, runs: list[str]) -> bool:
    """Print differences from one process, case by case; whether all are small enough."""
    devices = torch.cuda.device_count()
    print(f"{STEPS} steps on {f'{devices} GPUs' if devices else 'the CPU'}; the largest differences from one process:")
    print(f"{'':22}" + "".join(f"{run + ' loss':>17}{'grad norm':>11}" for run in runs))
    expected = compute([(ONE, run) for run in runs], checkpoint, folder)
    all_good = True
    for _, group in itertools.groupby(cases, lambda case: case.world_size):
        possible = []
        for case in group:
            if reason := why_not(case, checkpoint, devices):
                print(f"{case.name:22} left out: {reason}")
            else:
                possible.append(case)
        reports = compute(itertools.product(possible, runs), checkpoint, folder)
        for case in possible:
            cells = ""
            for run in runs:
                loss, norm = differences(reports[case.name, run], expected[ONE.name, run][0])
                good = max(loss, norm) <= TOLERANCE[run]
                cells += f"{loss:17.1e}{norm:11.1e}{'' if good else ' !'}"
                all_good = all_good and good
            print(f"{case.name:22}{cells}", flush=True)
    return all_good


def why_not(case: Case, checkpoint: Path, devices: int) -> str | None:
    """Why this machine, or this model, cannot have a case."""
    if devices and case.world_size > devices:
        return f"needs {case.world_size} GPUs"
    try:
        case.cut.check(read_config(checkpoint))
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
