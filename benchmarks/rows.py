"""Rows of a check: a line of JSON each, in one file that its phases append to. Imports nothing heavy."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
DONE = "done"
"""The row that ends a phase."""


@dataclass
class Rows:
    """What one phase writes."""

    path: Path
    phase: str
    failed: list[str] = field(default_factory=list)
    """Names of the rows that are wrong: losses that differ, tests that fail."""

    def add(self, row: str, problem: str = "", failed: bool = False, **figures: Any) -> None:
        """Append a row. `problem`: why it has no figures, or what is wrong; `failed`: the phase fails by it."""
        line: dict[str, Any] = {"phase": self.phase, "row": row, **figures}
        if problem:
            line |= {"problem": " ".join(problem.split())[:300], "failed": failed}
        if failed:
            self.failed.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{self.phase}: {row}: {problem or shortly(figures)}", file=sys.stderr, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, in the order of writing; a last line that was cut off is left out.

    Raises ValueError for another line that is no row.
    """
    rows, lines = [], path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and {"phase", "row"} <= row.keys():
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"{path}: line {number} is no row of a check; run the check again")
    return rows


def shortly(figures: dict[str, Any]) -> str:
    """The numbers of a row, on one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float | int))
