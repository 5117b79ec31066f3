"""A Transformer Engine that cannot be imported counts as none: mocks of the package, and of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# What 2.9 to 2.18 do without their extension for torch: the package warns, its part for torch raises no ImportError.
MOCK = {
    "__init__.py": """
try:
    from . import pytorch
except FileNotFoundError:
    pass
""",
    "pytorch/__init__.py": """
raise FileNotFoundError("Could not find shared object file for Transformer Engine torch lib.\\nSecond line.")
""",
}
CODE = """
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

import megatron_patch
from megatron_patch.config.train import Model
from megatron_patch.model.specs import uses_transformer_engine

def answer(model):
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        try:
            return uses_transformer_engine(model)
        except ValueError as error:
            return str(error)

def make(**changed):
    with mock.patch("megatron_patch.config.train.require_transformer_engine"):
        return Model(pretrained_checkpoint=Path(), **changed)

settings = [{}, {"transformer_impl": "local"}, {"transformer_impl": "transformer_engine"}, {"precision": "fp8"}]
print(json.dumps([answer(make(**setting)) for setting in settings]))
"""


def test_one_that_cannot_be_imported_is_left_alone_with_one_line(tmp_path):
    for name, text in MOCK.items():
        path = tmp_path / "transformer_engine" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    fault = (
        "transformer-engine is installed and cannot be imported "
        "(FileNotFoundError: Could not find shared object file for Transformer Engine torch lib.)"
    )
    assert json.loads(result.stdout.splitlines()[-1]) == [
        False,
        False,
        f"--transformer-impl transformer_engine: {fault}; use local",
        f"--precision fp8: needs Transformer Engine, and {fault}; use bf16",
    ]
    assert [line for line in result.stderr.splitlines() if "ransformer-engine" in line] == [
        f"{fault}: as if it were not installed"
    ]
