"""What is shown of a command's progress."""

from __future__ import annotations

import sys
import time

import pytest

from megatron_patch.files.meter import Meter


@pytest.fixture
def clock(monkeypatch):
    """Seconds that each look at the clock takes."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 6
        return now[0]

    monkeypatch.setattr(time, "monotonic", monotonic)


@pytest.mark.usefixtures("clock")
def test_a_line_every_ten_seconds(capsys):
    with Meter(100, "samples") as meter:
        for _ in range(4):
            meter.add(10)
    assert capsys.readouterr().err.splitlines() == [
        "20/100 samples,  1.67 samples/s, 00:48 left",
        "40/100 samples,  1.67 samples/s, 00:36 left",
    ]


@pytest.mark.usefixtures("clock")
def test_a_terminal_has_one_line_that_ends_with_the_last_count(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Meter(4_000_000_000, "B") as meter:
        meter.add(1_500_000_000)
        meter.add(2_500_000_000)
    *renewed, end = capsys.readouterr().err.split("\r")[1:]
    assert [line.partition(",")[0] for line in renewed] == ["1.50G/4.00GB", "4.00G/4.00GB"]
    assert end.startswith("4.00G/4.00GB, ")
    assert end.endswith("\n")


def test_what_is_done_at_once_says_nothing(capsys):
    with Meter(1, "B") as meter:
        meter.add(1)
    assert capsys.readouterr().err == ""
