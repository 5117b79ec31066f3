"""Which of the ranks that an error ends tells the launcher."""

from __future__ import annotations

import pytest
from torch.distributed import DistBackendError

from megatron_patch.training.worker import _others_are_gone


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (DistBackendError("NCCL watchdog"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (OSError("/data/gloomy/a.tar: no such file"), False),
        (ValueError("gloo"), False),
        (RuntimeError("out of memory"), False),
    ],
    ids=str,
)
def test_who_only_lost_the_others_is_silent(error, gone):
    assert _others_are_gone(error) == gone
