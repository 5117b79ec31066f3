"""Figures of a check that are kept for a card, and what moved since. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import DONE

FOLDER = Path(__file__).with_name("goldens")
TOLERANCES = {"loss": 0.02}
"""Relative, by the last part of a figure's name; of all others `USUAL`."""
USUAL = 0.10
KEPT = ("ms", "loss", "peak_gb", "tb_per_s", "kernels", "bmm", "syncs", "gpu_gb", "host_gb")
"""What is kept of a row. Rates follow from `ms`; a save's seconds are the disk's."""
CEILING = "tflops"
"""Kept of the phase that measures what the card can do."""
FACTS = ("card", "driver", "torch", "cuda", "cudnn", "python", "packages", "size", "precision", "date", "commit")


def figures_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """`phase / row / figure` -> its value, of all rows without a problem."""
    found = {}
    for row in rows:
        if row.get("problem"):
            continue
        names = (*KEPT, CEILING) if row["phase"] == "ceilings" else KEPT
        found |= {f"{row['phase']} / {row['row']} / {name}": row[name] for name in names if name in row}
    return found


def facts_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the check says about the machine. Raises ValueError where it says nothing."""
    for row in rows:
        if row["phase"] == row["row"] == "card":
            return {name: row.get(name) for name in FACTS}
    raise ValueError("the results have no row of the phase card; run sh benchmarks/gpu_check.sh")


def path_of(facts: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Where the figures of a card and a size of model are kept."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', facts['card'].lower()).strip('-')}-{facts['size'].lower()}.json"


def keep(rows: list[dict[str, Any]], phases: Sequence[str], folder: Path = FOLDER) -> Path:
    """Write a check's figures as the card's golden. `phases`: of a whole check.

    Raises ValueError for a CPU's, for a check that failed, and for one that was cut off.
    """
    facts = facts_of(rows)
    if not facts["driver"]:
        raise ValueError(f"{facts['card']}: goldens are of GPUs; run the check on one")
    if wrong := [f"{row['phase']} / {row['row']}" for row in rows if row.get("failed")]:
        raise ValueError(f"the check failed ({', '.join(wrong)}); only a good one is kept")
    done = {row["phase"] for row in rows if row["row"] == DONE}
    if cut := [phase for phase in phases if phase not in done]:
        raise ValueError(f"the check did not come to {', '.join(cut)}; only a whole one is kept")
    figures = {
        name: {"value": value, "tolerance": TOLERANCES.get(name.rpartition(" / ")[2], USUAL)}
        for name, value in figures_of(rows).items()
    }
    if not figures:
        raise ValueError("the check has no figures; nothing is kept")
    path = path_of(facts, folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "figures": figures}, indent=1) + "\n")
    return path


def compare(rows: list[dict[str, Any]], folder: Path = FOLDER) -> tuple[bool, str]:
    """Whether no figure of the card's golden moved by more than its tolerance, and a report.

    A figure that the new check lacks counts as moved. Without a golden there is nothing to move.
    """
    facts = facts_of(rows)
    path = path_of(facts, folder)
    if not path.exists():
        return True, (
            f"no golden for {facts['card']}, {facts['size']}: nothing was compared. To keep these figures as one:\n"
            "    python benchmarks/gpu_table.py --keep"
        )
    try:
        golden = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); keep a check again") from None
    figures = figures_of(rows)
    lines = []
    for name, kept in golden["figures"].items():
        value, before, tolerance = figures.get(name), kept["value"], kept["tolerance"]
        if value is None:
            lines.append(f"{name}: {before:.4g} before, not in this check")
        elif not abs(value - before) <= tolerance * abs(before):  # so that NaN is a difference
            share = f"{value / before - 1:+.1%}" if before else "from 0"
            lines.append(f"{name}: {before:.4g} -> {value:.4g} ({share}, allowed {tolerance:.0%})")
    new = len(figures.keys() - golden["figures"].keys())
    about = f"{path.name}, of {golden['date']} (driver {golden['driver']}, torch {golden['torch']}, {golden['commit']})"
    head = f"{len(lines)} of {len(golden['figures'])} figures moved since {about}"
    return not lines, "\n".join([head + (f"; {new} are new" if new else ""), *lines])
