"""The benchmarks of training run, and all sides of them learn the same. Figures of so small a model say nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.end_to_end.scripts import ROOT, call, environment


def test_training_against_transformers(tmp_path):
    words = "--size tiny --device cpu --stages projector --rounds 1 --steps 2 --json rows.jsonl".split()
    result = call("python", ROOT / "benchmarks/train.py", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(
        r"^(transformers|ours|ours, unfused attention) +[\d.]+ +\d+ +[\d.]+ ", result.stdout, re.MULTILINE
    )
    assert rows == ["transformers", "ours", "ours, unfused attention"]
    (largest,) = re.findall(r"largest difference (\S+), allowed 0.0001", result.stdout)
    assert float(largest) < 1e-4
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(line["row"], line["stage"]) for line in lines] == [(row, "projector") for row in rows]
    assert all(line["ms"] > 0 and len(line["losses"]) == 2 for line in lines)


def test_packing_against_padding(tmp_path):
    words = "--size tiny --samples 2 --steps 2".split()
    result = call("python", ROOT / "benchmarks/packing.py", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r"^\| (padded .*?|packed) \| (\d+) \|", result.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["padded to 1,024", "padded to the longest", "packed"]
    assert [int(positions) for _, positions in rows] == sorted((int(positions) for _, positions in rows), reverse=True)


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The GPU's check as far as a CPU has what it asks for, and its rows."""
    folder = tmp_path_factory.mktemp("check with a space")
    words = "--size tiny --device cpu --steps 2 --scale 20".split()
    variables = {"OUT": str(folder / "out"), "ENGINE": str(folder / "engine"), "PYTHON": sys.executable}
    result = subprocess.run(
        ["sh", str(ROOT / "benchmarks/gpu_check.sh"), *words],
        cwd=folder,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=900,
    )
    return result, [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]


def test_the_check_for_a_gpu_runs_all_its_phases(checked):
    result, rows = checked
    assert result.returncode == 0, result.stdout + result.stderr
    done = [row["phase"] for row in rows if row["row"] == "done"]
    assert done == "card ceilings stage1 audit packing stage2 memory tests engine-build engine".split()
    assert not [row for row in rows if row.get("failed")]


def test_the_check_compares_all_contestants(checked):
    _, rows = checked
    measured = {(row["phase"], row["row"]): row for row in rows if "loss_difference" in row}
    for phase, row in (
        ("stage1", "transformers, 2"),
        ("stage1", "ours, 2"),
        ("stage1", "ours, 1"),
        ("stage1", "ours, lengths as they come, 2"),
        ("packing", "ours, packed, 1"),
        ("stage2", "ours, 2 x 4"),
    ):
        assert measured[phase, row]["loss_difference"] < 1e-4
        assert measured[phase, row]["ms"] > 0
    audit = {row["row"]: row for row in rows if row["phase"] == "audit"}
    assert audit["kernels, 1"]["bmm"] == audit["kernels, 2"]["bmm"] == 0


def test_the_table_has_the_rows_and_fits_a_screen(checked):
    result, rows = checked
    for row in rows:
        if row["row"] not in ("done", "card"):
            assert f"{row['row']}" in result.stdout
    assert "| ours, no cuDNN attention | not run: needs a GPU |" in result.stdout
    assert "**Failed**" not in result.stdout
    assert len(result.stdout) < 12_000


def test_what_ends_a_process_is_a_row_and_fails_the_check(tmp_path):
    """Too little time for anything: each process is cut, the next still starts, and the table says so."""
    words = "--size tiny --device cpu --scale 0.001".split()
    variables = {"OUT": str(tmp_path / "out"), "ENGINE": str(tmp_path / "engine"), "PYTHON": sys.executable}
    result = subprocess.run(
        ["sh", str(ROOT / "benchmarks/gpu_check.sh"), *words],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert result.stdout.count("cut: its time was over") >= 4
    assert "stage1 / done" in result.stdout
    assert "memory / done" in result.stdout
