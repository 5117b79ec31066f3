"""The benchmarks of training run, and all sides of them learn the same. Figures of so small a model say nothing."""

from __future__ import annotations

import re

from tests.end_to_end.scripts import ROOT, call


def test_training_against_transformers(tmp_path):
    words = "--size tiny --device cpu --stages projector --rounds 1 --steps 2".split()
    result = call("python", ROOT / "benchmarks/train.py", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(
        r"^(transformers|ours|ours, unfused attention) +[\d.]+ +\d+ +[\d.]+ ", result.stdout, re.MULTILINE
    )
    assert rows == ["transformers", "ours", "ours, unfused attention"]
    (largest,) = re.findall(r"largest difference (\S+), allowed 0.0001", result.stdout)
    assert float(largest) < 1e-4


def test_packing_against_padding(tmp_path):
    words = "--size tiny --samples 2 --steps 2".split()
    result = call("python", ROOT / "benchmarks/packing.py", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r"^\| (padded .*?|packed) \| (\d+) \|", result.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["padded to 1,024", "padded to the longest", "packed"]
    assert [int(positions) for _, positions in rows] == sorted((int(positions) for _, positions in rows), reverse=True)
