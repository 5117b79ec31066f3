"""`megatron-patch`: each command is the script's own, under its own name."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points

import pytest

from megatron_patch import cli


def test_it_is_what_an_installation_brings():
    (command,) = entry_points(group="console_scripts", name="megatron-patch")
    assert command.load() is cli.console


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_tells_its_usage(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/megatron-patch", name, "--help"])
    try:
        code = cli.main()
    except SystemExit as end:  # argparse's
        code = end.code
    assert code in (0, 2)
    said = "".join(capsys.readouterr())
    assert f"megatron-patch {name}" in said or "inspect_samples.py" in said
    assert callable(import_module(cli.COMMANDS[name][0]).main)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "usage: megatron-patch COMMAND"),
        (["--help"], 0, "  prepare    LLaVA's json and images"),
        (["export"], 2, "error: export: no such command; expected one of prepare, convert, train, inspect, preview"),
    ],
)
def test_without_a_command_they_are_listed(words, code, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megatron-patch", *words])
    assert cli.main() == code
    assert said in "".join(capsys.readouterr())


def test_a_mistake_is_answered_at_once(tmp_path):
    code = "import sys; sys.argv[1:] = ['train', '--lr', 'x']; from megatron_patch.cli import console; console()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
