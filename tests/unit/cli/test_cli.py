"""`megatron-patch`: each command is the script's own, under its own name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points

import pytest

from megatron_patch import cli
from megatron_patch.files.names import STORE


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
    assert code == 0
    assert f"megatron-patch {name}" in capsys.readouterr().out
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


def test_commands_answer_before_torch_is_imported():
    code = f"import importlib, sys; [importlib.import_module(m) for m, _ in {list(cli.COMMANDS.values())}]; "
    code += "sys.exit(bool({'torch', 'transformers', 'megatron.energon'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_interrupted_rank_ends_by_its_signal():
    """Before training takes note of signals: exit code 130 would tell the launcher that the run was saved."""
    code = (
        "import sys; sys.argv[1:] = '--lr 1 --train-iters 1 --output x --data-path mock --model-config y'.split()\n"
        "from megatron_patch.cli import train\n"
        "from megatron_patch.files.terminal import run\n"
        "from megatron_patch.training import worker\n"
        "def interrupted(config): raise KeyboardInterrupt\n"
        "worker.run = interrupted\n"
        "run(train.main)\n"
    )
    environment = {**os.environ, STORE: "file://nowhere"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT, ended.stderr
