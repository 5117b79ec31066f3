"""Who may import whom: read from the files themselves."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_patch"
# Rooms import from those in lines above their own, and nothing from beside or below.
ORDER = (
    ("tensor_io", "forking"),
    ("files", "patches"),
    ("families", "__init__"),
    ("config", "stores"),
    ("model", "data", "estimate"),
    ("conversion", "prepare"),
    ("training",),
    ("cli", "toolkits", "examples", "benchmarks", "docs", "tests"),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
OF_MEGATRON_CORE = {"model", "training", "patches"}
USES_THE_MODEL = ("conversion/verify.py",)  # to compare with it
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    room, used = path.relative_to(PACKAGE).parts[0].removesuffix(".py"), imports(path)
    own = {name.split(".")[1] for name in used if name.startswith("megatron_patch.")}
    assert {other for other in own if LEVEL[other] >= LEVEL[room]} <= {room}
    assert not {name.split(".")[0] for name in used} & {"toolkits", "examples", "benchmarks", "tests"}
    assert not any(name.startswith("megatron.training") for name in used)
    if room not in OF_MEGATRON_CORE:
        assert not any(name.startswith("megatron.core") for name in used)
        assert "model" not in own or str(path.relative_to(PACKAGE)) in USES_THE_MODEL


def test_no_shell_string_is_built_and_nobody_edits_the_path():
    """Commands are lists of words, so that a path can be anything."""
    wrong = {
        ".py": r"shell=True|os\.system\(|os\.popen\(|sys\.path\b(?!,)|get_args\(\)",
        ".sh": r"^\s*eval\b|\bsh -c\b",
    }
    for path in (path for folder in (PACKAGE, *(ROOT / name for name in ORDER[-1])) for path in folder.rglob("*.*")):
        if path.suffix in wrong and path != Path(__file__):
            assert not re.search(wrong[path.suffix], path.read_text(), re.MULTILINE), path
