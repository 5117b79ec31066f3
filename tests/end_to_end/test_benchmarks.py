"""The benchmark of training runs, and both sides of it learn the same."""

from __future__ import annotations

import re

from tests.end_to_end.scripts import ROOT, call


def test_training_against_transformers(tmp_path):
    """The figures of so small a model say nothing; its table is whole, and its losses are equal."""
    words = "--size tiny --device cpu --stages projector --rounds 1 --steps 2".split()
    result = call("python", ROOT / "benchmarks/train.py", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(
        r"^(transformers|ours|ours, unfused attention) +[\d.]+ +\d+ +[\d.]+ ", result.stdout, re.MULTILINE
    )
    assert rows == ["transformers", "ours", "ours, unfused attention"]
    (largest,) = re.findall(r"largest difference (\S+), allowed 0.0001", result.stdout)
    assert float(largest) < 1e-4
