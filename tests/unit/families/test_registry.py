"""A model is one file."""

from __future__ import annotations

from pathlib import Path

import pytest

import megatron_patch
from megatron_patch.families.registry import LANGUAGE_FAMILIES, VISION_FAMILIES
from megatron_patch.families.table import Family

SOURCES = sorted(Path(megatron_patch.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("name", ["siglip"])
def test_a_model_is_its_table_and_a_name_in_the_registry(name):
    named = [path.name for path in SOURCES if name in path.read_text().lower()]
    assert named == ["registry.py", f"{name}.py"]


@pytest.mark.parametrize("family", [*LANGUAGE_FAMILIES.values(), *VISION_FAMILIES.values()], ids=lambda it: it.name)
def test_what_the_network_is_stands_in_the_table(family: Family):
    assert family.norm is not None
