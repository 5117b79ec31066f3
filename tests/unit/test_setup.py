"""What `pip install` is asked for."""

from __future__ import annotations

from importlib.metadata import requires
from pathlib import Path
from unittest import mock

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def test_transformer_engine_is_the_one_that_megatron_core_asks_for():
    with mock.patch("setuptools.setup") as called:
        exec((ROOT / "setup.py").read_text(), {})
    (ours,) = map(Requirement, called.call_args.kwargs["extras_require"]["te"])
    (theirs,) = (found for found in map(Requirement, requires("megatron-core")) if found.name == "transformer-engine")
    assert ours.extras == {"pytorch"}
    for version in ("2.8", "2.9", "2.10.0", "2.11.0", "2.12", "2.20.2"):
        assert ours.specifier.contains(version) == theirs.specifier.contains(version), version
