"""The benchmarks are scripts of one folder, which import each other by name."""

from __future__ import annotations

import pytest

from tests.end_to_end.scripts import ROOT


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
