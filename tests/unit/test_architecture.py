"""Who may import whom: read from the files themselves."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_patch"

READ = ("archives", "files", "opcodes", "pickles", "preprocessor")
# Folder or file -> what of this package it may import, besides itself.
ALLOWED = {
    "checks.py": (),
    "sizes.py": (),
    "files.py": (),
    "forking.py": (),
    "terminal.py": (),
    "text.py": (),
    "opcodes.py": (),
    "archives.py": ("opcodes",),
    "pickles.py": ("archives", "files", "opcodes"),
    "preprocessor.py": ("files",),
    "parallel_config.py": ("checks", "sizes"),
    "checkpoint_config.py": ("checks",),
    "config.py": ("checks", "checkpoint_config", "files", "parallel_config", "sizes"),
    "arguments.py": (),
    "conversion.py": ("config", "arguments", "checkpoint", "families", "files", "preprocessor", "sizes"),
    "parallel.py": ("config",),
    "estimate": ("checks", "config", "families", "sizes"),
    "launch.py": ("config", "families", "files", "forking", "checkpoint", "estimate", "sizes"),
    "patches": ("pickles",),
    "families": ("files", "sizes"),
    "model": ("config", "patches", "sizes"),
    "checkpoint": ("checks", "config", "sizes", "families", "model", *READ),
    "data": ("config", "sizes", "text", *READ),
    "training": (
        "config",
        "sizes",
        "families",
        "model",
        "checkpoint",
        "data",
        "parallel",
        "estimate",
        "terminal",
        "text",
        *READ,
    ),
    "__init__.py": ("forking", "patches"),
}
WITHOUT_MEGATRON_CORE = ("config.py", "sizes.py", "arguments.py", "conversion.py", "launch.py", "families", "data")
WITHOUT_MEGATRON_CORE += ("parallel_config.py", "checkpoint_config.py", "files.py", "pickles.py", "preprocessor.py")
WITHOUT_MEGATRON_CORE += ("terminal.py", "estimate", "opcodes.py", "archives.py")
MEGATRON_CORE_IN_CHECKPOINT = ("resume.py", "saving.py")
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path):
    place = path.relative_to(PACKAGE).parts[0]
    used = imports(path)
    own = {name.split(".")[1] for name in used if name.startswith("megatron_patch.")}
    assert own <= {place.removesuffix(".py"), *ALLOWED[place]}
    assert not any(name.startswith(("megatron.training", "toolkits", "examples", "tests")) for name in used)
    if place in WITHOUT_MEGATRON_CORE or (place == "checkpoint" and path.name not in MEGATRON_CORE_IN_CHECKPOINT):
        assert not any(name.startswith("megatron.core") for name in used)


def test_no_shell_string_is_built():
    """Commands are lists of words, so that a path can be anything."""
    for folder in ("megatron_patch", "toolkits", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not any(word in text for word in ("shell=True", "os.system(", "os.popen(")), path
        for path in (ROOT / folder).rglob("*.sh"):
            assert not re.search(r"^\s*eval\b|\bsh -c\b", path.read_text(), re.MULTILINE), path


def test_nobody_edits_the_path_or_reads_global_arguments():
    for folder in ("megatron_patch", "toolkits", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != Path(__file__):
                text = path.read_text()
                assert "sys.path." not in text, path
                assert "get_args()" not in text, path
