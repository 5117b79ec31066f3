"""The results of a check on a GPU as the tables of docs/benchmarks.md, and what moved since the card's golden.

    python benchmarks/gpu_table.py [FOLDER] [--compare | --keep]

FOLDER holds results.jsonl (default: $OUT, else build/gpu_check). Exit code 1 when something moved (--compare), or
cannot be kept (--keep).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goldens
from gpu import PHASES
from rows import DONE, RESULTS, read
from work import peak_tflops

Row = dict[str, Any]
LONGEST_PROBLEM = 160
TRAINING = ("stage1", "packing", "stage2", "engine")
TITLES = {
    "stage1": "Stage 1, the projector trains; samples of a step after each name",
    "packing": "Packing, six samples",
    "stage2": "Stage 2, the tower is frozen, a quarter of the layers; samples (x micro batches)",
    "engine": "Transformer Engine's layers, stage 1",
}


def main() -> int:
    """Print the tables, or compare, or keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(os.environ.get("OUT", "build/gpu_check")))
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--compare", action="store_true", help="say what moved since the golden of the same card")
    either.add_argument("--keep", action="store_true", help="write the figures as this card's golden")
    parser.add_argument("--goldens", type=Path, default=goldens.FOLDER, help="folder of the goldens")
    options = parser.parse_args()
    path = options.folder / RESULTS
    if not path.is_file():
        print(f"error: {path}: not there; run sh benchmarks/gpu_check.sh first", file=sys.stderr)
        return 1
    try:
        rows = read(path)
        if options.keep:
            print(f"kept in {goldens.keep(rows, PHASES, options.goldens)}")
        elif options.compare:
            same, report = goldens.compare(rows, options.goldens)
            print(report)
            return 0 if same else 1
        else:
            print(table(rows))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyError, TypeError, AttributeError) as error:
        print(f"error: {path}: a row is not as the check writes it ({error!r}); run the check again", file=sys.stderr)
        return 1
    return 0


def table(rows: list[Row]) -> str:
    """All phases in markdown."""
    by_phase: dict[str, list[Row]] = {}
    for row in rows:
        by_phase.setdefault(row["phase"], []).append(row)
    card = next((row for row in by_phase.get("card", ()) if row["row"] == "card"), {})
    ceilings = by_phase.get("ceilings", [])
    measured = next((row["tflops"] for row in ceilings if row["row"] == "square" and "tflops" in row), None)
    parts = [about(card)]
    for phase, found in by_phase.items():
        found = [row for row in found if row["row"] != DONE or row.get("problem")]
        if phase == "card" or not found:
            continue
        if phase in TRAINING:
            parts.append(
                training(TITLES[phase], found, peak_tflops(card.get("card", ""), card.get("precision", "")), measured)
            )
        elif phase == "ceilings":
            parts.append(lines("What the card can do", found, ceiling))
        else:
            parts.append(lines(phase, found, facts))
    seconds = {row["phase"]: row["seconds"] for row in rows if row["row"] == DONE and "seconds" in row}
    parts.append("Seconds of each phase: " + ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.items()))
    if wrong := [f"{row['phase']} / {row['row']}" for row in rows if row.get("failed")]:
        parts.append(f"**Failed**: {', '.join(wrong)}")
    return "\n\n".join(parts)


def about(card: Row) -> str:
    """The line above the tables: card, driver, versions, date."""
    if not card:
        return "The phase `card` has no row."
    packages = ", ".join(f"{name} {version}" for name, version in card["packages"].items())
    driver = f"driver {card['driver']}, " if card["driver"] else ""
    return (
        f"{card['card']}, {driver}torch {card['torch']}, cuDNN {card['cudnn'] or 'none'}, "
        f"Python {card['python']}, {packages}; "
        f"{card['size']}, {card['precision']}, median of {card['steps']} steps; {card['date']}, commit {card['commit']}"
    )


def training(title: str, rows: list[Row], peak: float | None, measured: float | None) -> str:
    """A table of measured steps."""
    head = ["ms (least, most)", "samples/s", "tokens/s", "TFLOP/s", "of peak", "of square", "GB", "plan", "loss"]
    text = [f"{title}:", "", f"| | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for row in rows:
        problem = row.get("problem", "")[:LONGEST_PROBLEM]
        if "ms" not in row:
            text.append(f"| {row['row']} | {problem} |" + " |" * (len(head) - 1))
            continue
        cells = [
            f"{row['ms']:.1f} ({row['ms_min']:.1f}, {row['ms_max']:.1f})",
            f"{row['samples_per_second']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['tflops']:.3g}",
            f"{row['tflops'] / peak:.0%}" if peak else "",
            f"{row['tflops'] / measured:.0%}" if measured else "",
            f"{row['peak_gb']:.1f}" if "peak_gb" in row else "",
            f"{row['plan_gb']:.1f}" if "plan_gb" in row else "",
            f"{row['loss']:.4f}" + (f" **{problem}**" if problem else ""),
        ]
        text.append(f"| {row['row']} | {' | '.join(cells)} |")
    return "\n".join(text)


def lines(title: str, rows: list[Row], describe: Callable[[Row], str]) -> str:
    """A list of a phase's rows."""
    return "\n".join([f"{title}:", "", *(f"- {row['row']}: {describe(row)}" for row in rows)])


def ceiling(row: Row) -> str:
    """A rate."""
    if "tb_per_s" in row:
        return f"{row['tb_per_s']:.3g} TB/s, bytes read and written"
    if "tflops" in row:
        return f"{row['tflops']:.3g} TFLOP/s ({row['m']} x {row['k']} x {row['n']})"
    return row.get("problem", "")


def facts(row: Row) -> str:
    """Everything that a row says."""
    shown = []
    for name, value in row.items():
        if name in ("phase", "row", "problem", "failed"):
            continue
        if isinstance(value, dict):
            shown.append(f"{name}: " + ", ".join(f"{key} {part}" for key, part in list(value.items())[:12]))
        elif isinstance(value, list):
            shown.append(f"{name}: {', '.join(map(str, value))}")
        else:
            shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    problem = row.get("problem", "")[:LONGEST_PROBLEM]
    return "; ".join([f"**{problem}**"] * bool(problem) + shown)


if __name__ == "__main__":
    sys.exit(main())
