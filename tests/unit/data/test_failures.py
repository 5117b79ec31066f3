"""What the log says of samples that cannot be read."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_patch.data.failures import Failures


def test_keys_and_reasons_are_logged_without_control_characters(caplog):
    with caplog.at_level(logging.WARNING):
        Failures(Path("wds"), 1000)(ValueError("broken\x1b[2J\nheader"), {"__key__": "a\x1b[31m\u202e/1"})
    assert caplog.messages == [r"left out sample a\x1b[31m\u202e/1: broken\x1b[2J header"]
