"""The quickstart's last words: loss_curve.png, a table, and exit code 1 when the model did not learn.

    python quickstart_report.py FOLDER

FOLDER is what quickstart.sh filled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from quickstart_watch import ITERATION, RESUMED

LEAST_EXACT = 0.95
MOST_SHUFFLED = 0.30
"""Exact captions with the pictures shuffled; more, and the captions could be guessed without looking."""


@dataclass(frozen=True)
class Interruption:
    """Where training was killed, and where it went on."""

    killed_after: int
    resumed_at: int


def read_interruption(killed_log: Path, resumed_log: Path) -> Interruption:
    """Iterations, out of the logs of the run that was killed and of the one that went on."""
    killed_after = max(int(match[1]) for match in ITERATION.finditer(killed_log.read_text()))
    resumed = RESUMED.search(resumed_log.read_text())
    if not resumed:
        raise ValueError(f"{resumed_log}: the second run did not resume")
    return Interruption(killed_after, int(resumed[1]))


def read_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """(iteration, value) of one TensorBoard scalar; empty where it was never written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # It remarks on every resumed curve that points were purged, which is meant.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    if name not in accumulator.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def check_curve(curve: list[tuple[int, float]]) -> None:
    """Raise ValueError unless there is exactly one point for every iteration from 1 on."""
    if [iteration for iteration, _ in curve] != list(range(1, len(curve) + 1)):
        raise ValueError("lm loss in TensorBoard: an iteration is missing or there twice")


def draw_curve(
    path: Path, curve: list[tuple[int, float]], validation: list[tuple[int, float]], interruption: Interruption
) -> None:
    """Loss over iterations, with the place where training was killed and resumed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*zip(*curve, strict=True), linewidth=1, label="lm loss")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", linewidth=1, markersize=4, label="lm loss validation")
    killed, resumed = interruption.killed_after, interruption.resumed_at
    axes.axvspan(resumed, killed, color="tab:red", alpha=0.15)
    axes.axvline(resumed, color="tab:green", linestyle="--", label=f"resumed at {resumed}")
    axes.axvline(killed, color="tab:red", linestyle="--", label=f"killed after {killed}")
    axes.set(xlabel="iteration", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def read_stages(path: Path) -> list[tuple[str, int]]:
    """(stage, seconds), out of a file with the second in which each stage began, and `end`."""
    lines = [line.split(" ", 1) for line in path.read_text().splitlines()]
    starts = [(name, int(second)) for second, name in lines]
    return [(name, following - second) for (name, second), (_, following) in itertools.pairwise(starts)]


def wait_share(board: Path) -> float:
    """Part of the iterations' time that the rank which waited longest waited for data."""
    waited, whole = (read_scalars(board, name) for name in ("batch-generator-time", "iteration-time"))
    return sum(seconds for _, seconds in waited) / sum(seconds for _, seconds in whole)


def share(rows: list[dict[str, str]], said: str) -> float:
    """Part of the pictures whose caption is exact, word for word."""
    return sum(row[said] == row["expected"] for row in rows) / len(rows)


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns, aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def main() -> int:
    """Exit code 0 when enough captions are exact, and only with the right picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    board = folder / "output" / "tensorboard"
    captions = json.loads((folder / "captions.json").read_text())
    interruption = read_interruption(folder / "log" / "train-killed.log", folder / "log" / "train-resumed.log")
    curve, validation = read_scalars(board, "lm loss"), read_scalars(board, "lm loss validation")
    check_curve(curve)
    draw_curve(folder / "loss_curve.png", curve, validation, interruption)

    exact, shuffled = share(captions, "said"), share(captions, "shuffled")
    stages = read_stages(folder / "log" / "stages")
    for row in captions[:3]:
        print(f"  {folder / 'held_out' / row['image']}: {row['said']}")
    print()
    rows = [(re.sub("^. ", "", name), f"{seconds} s") for name, seconds in stages]
    rows += [
        ("together", f"{sum(seconds for _, seconds in stages)} s"),
        ("iterations", f"{len(curve)}"),
        ("killed, resumed", f"after {interruption.killed_after}, at {interruption.resumed_at}"),
        ("waited for data", f"{wait_share(board):.1%} of the training time"),
        ("lm loss, first and last", f"{curve[0][1]:.4f}, {curve[-1][1]:.4f}"),
        ("lm loss validation, last", f"{validation[-1][1]:.4f}" if validation else "none"),
        ("exact captions, held-out pictures", f"{exact:.1%} of {len(captions)} (at least {LEAST_EXACT:.0%} expected)"),
        ("the same, pictures shuffled", f"{shuffled:.1%} (at most {MOST_SHUFFLED:.0%} expected)"),
        ("loss curve", f"{folder / 'loss_curve.png'}"),
        ("TensorBoard", f"tensorboard --logdir {shlex.quote(str(board))}"),
        ("model for transformers", f"{folder / 'hf'}"),
    ]
    print(table(rows))
    if exact < LEAST_EXACT or shuffled > MOST_SHUFFLED:
        print("error: the model did not learn to caption", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
