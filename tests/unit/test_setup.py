"""What `pip install` is asked for."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement


def test_the_lowest_versions_are_tested():
    """`make test-lowest` installs each lower bound of pyproject.toml but torch's."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    dependencies = text.partition("dependencies = [")[2].partition("\n]")[0]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', dependencies))
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    tested = dict(re.findall(r"([\w-]+)==([\d.]+)", makefile))
    del bounds["torch"]
    assert {name: tested[name] for name in bounds} == bounds


def transformer_engine(package: str) -> Requirement:
    """What `package`, as it is installed, asks for."""
    (found,) = (found for found in map(Requirement, requires(package)) if found.name == "transformer-engine")
    return found


def test_transformer_engine_is_the_one_that_megatron_core_asks_for():
    ours, theirs = transformer_engine("megatron-patch-llava"), transformer_engine("megatron-core")
    assert ours.extras == {"pytorch"}
    for version in ("2.8", "2.9", "2.10.0", "2.11.0", "2.12", "2.20.2"):
        assert ours.specifier.contains(version) == theirs.specifier.contains(version), version
