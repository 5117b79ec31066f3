"""The phases of the check on a GPU; `sh benchmarks/gpu_check.sh` runs them all, one process each.

    python benchmarks/gpu.py stage1 [--size 7B] [--device cuda] [--out ./build/gpu_check]

Each appends rows to OUT/results.jsonl as soon as it has them. `plan` prints the processes, each with its limit in
seconds. On a CPU everything runs at --size tiny, and what only a GPU has gets a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rows import DONE, RESULTS, Rows, read

ROOT = Path(__file__).parents[1]

PROCESSES = (
    (200, ("card", "ceilings", "stage1")),
    (75, ("audit", "packing")),
    (130, ("stage2", "memory")),
    (150, ("tests",)),
    (240, ("engine-build",)),
    (120, ("engine",)),
)
"""In their order, the figures that matter most first: a limit in seconds, and the phases of one process."""
ON_A_GPU = ("tests", "engine-build", "engine")
"""What a CPU has nothing of."""
PHASES = tuple(phase for _, phases in PROCESSES for phase in phases)
CUT = (124, 137)
"""Exit codes of what `timeout` ended."""


@dataclass
class Run:
    """What a phase is told."""

    size: str
    steps: int
    out: Path
    engine: Path
    """Folder with Transformer Engine to build and to import, where it was carried."""
    limit: float
    """Seconds a command that a phase starts may take."""
    folder: Path
    """For temporary files."""
    rows: Rows
    has_gpu: bool
    is_started: bool = False

    @property
    def precision(self) -> str:
        """Of weights and activations."""
        return "bf16" if self.has_gpu else "fp32"

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """The first is the one that most rows have."""
        return (2, 1) if self.size == "tiny" else (8, 1, 4, 16)

    def start(self) -> None:
        """Begin torch.distributed and megatron.core's groups, for one process."""
        if not self.is_started:
            from megatron_patch.config.train import Parallel
            from megatron_patch.model import groups

            groups.start(Parallel(), seed=1, init_method=f"file://{self.folder}/store", rank=0, world_size=1)
            self.is_started = True

    def description(self, name: str, num_layers: int | None = None) -> Path:
        """A folder that describes the model, with so many layers of the language model; None: all."""
        from inputs import write_description

        folder = self.folder / name
        if not folder.is_dir():
            folder.mkdir()
            write_description(folder, self.size, num_layers)
        return folder


def main() -> int:
    """Run the phases that were named; 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "phases", nargs="+", choices=["plan", *PHASES], metavar="phase", help=f"plan, {', '.join(PHASES)}"
    )
    parser.add_argument("--size", choices=["7B", "100M", "tiny"], default="7B", help="of the model")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu_check")), help="default: $OUT"
    )
    parser.add_argument("--engine", type=Path, default=Path("build/gpu/engine"), help="folder with Transformer Engine")
    parser.add_argument("--steps", type=int, default=9, help="measured steps of a row")
    parser.add_argument("--scale", type=float, default=1.0, help="of all limits")
    parser.add_argument("--ended", type=int, help="run nothing: note that these phases ended with this exit code")
    options = parser.parse_args()
    if options.device == "cuda" and options.ended is None:
        import torch

        if not torch.cuda.is_available():
            print("error: --device cuda: torch sees no GPU; use --size tiny --device cpu", file=sys.stderr)
            return 2
    if options.phases == ["plan"]:
        for seconds, phases in PROCESSES:
            print(max(1, round(options.scale * seconds)), *phases)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.ended is not None:
        return note_end(options)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for devices
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tiny model gains nothing by more
    return run_phases(options)


def note_end(options: argparse.Namespace) -> int:
    """A row for each phase that did not come to its end."""
    path = options.out / RESULTS
    done = {row["phase"] for row in read(path) if row["row"] == DONE} if path.exists() else set()
    why = "cut: its time was over" if options.ended in CUT else f"ended with exit code {options.ended}"
    for phase in options.phases:
        if phase not in done:
            Rows(path, phase).add(DONE, problem=why, failed=True)
    return 1


def run_phases(options: argparse.Namespace) -> int:
    """One phase after the other; an error of one is its row, and does not stop the next."""
    failed = False
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-check-")))
        run = Run(
            size=options.size,
            steps=options.steps,
            out=options.out,
            engine=options.engine,
            limit=0.0,
            folder=folder,
            rows=Rows(options.out / RESULTS, ""),
            has_gpu=options.device == "cuda",
        )
        for name in options.phases:
            run.rows, start = Rows(options.out / RESULTS, name), time.perf_counter()
            run.limit = options.scale * next(seconds for seconds, phases in PROCESSES if name in phases) - 5
            problem = ""
            try:
                if run.has_gpu or name not in ON_A_GPU:
                    phase(name)(run)
                else:
                    run.rows.add(name, problem="not run: needs a GPU")
            except Exception as error:
                traceback.print_exc()
                problem = f"{type(error).__name__}: {error}"
            run.rows.add(DONE, problem, failed=bool(problem), seconds=time.perf_counter() - start)
            failed = failed or bool(run.rows.failed)
            if run.is_started:
                from timing import release

                release()
        if run.is_started:
            from megatron_patch.model import groups

            groups.stop()
    return int(failed)


def phase(name: str) -> Callable[[Run], None]:
    """The function of a phase; its module is imported only for it."""
    if name in ("card", "ceilings"):
        import gpu_card as module
    elif name in ("audit", "memory"):
        import gpu_audit as module
    elif name in ("tests", "engine-build"):
        import gpu_commands as module
    else:
        import gpu_training as module
    return getattr(module, name.replace("-", "_"))


if __name__ == "__main__":
    sys.exit(main())
