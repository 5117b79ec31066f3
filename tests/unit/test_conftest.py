"""Tests see no GPU, nor do the processes that they start, unless they are those that need one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What each process of a test run (xdist's workers too) sees when it is configured, and with what it has collected.
PLUGIN = """
import json, os, sys
from pathlib import Path

def pytest_configure(config):
    config.early = "torch" in sys.modules

def pytest_collection_finish(session):
    name = os.environ.get("PYTEST_XDIST_WORKER", "main")
    report = {
        "devices": os.environ["CUDA_VISIBLE_DEVICES"],
        "torch came first": session.config.early,
        "marks": sorted({mark.name for item in session.items for mark in item.iter_markers()} & {"gpu"}),
    }
    Path(__file__).with_name(name + ".json").write_text(json.dumps(report))
"""


def collect(folder: Path, *arguments: str) -> dict[str, dict]:
    """What every process of `pytest ARGUMENTS` reports, where device 0 is visible."""
    (folder / "reporting.py").write_text(PLUGIN)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "reporting", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**environment, "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": path},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {report.stem: json.loads(report.read_text()) for report in folder.glob("*.json")}


@pytest.mark.parametrize(
    ("arguments", "devices", "marks"),
    [
        (["tests/unit/model/test_groups.py"], "", []),
        (["-m", "gpu", "tests/unit/test_architecture.py", "tests/gpu"], "0", ["gpu"]),
        (["tests/unit/test_architecture.py", "tests/gpu/test_run.py::test_train_and_resume"], "0", ["gpu"]),
    ],
    ids=["a unit test", "by mark", "by path"],
)
def test_the_gpu_is_visible_where_it_is_asked_for(tmp_path, arguments, devices, marks):
    report = {"devices": devices, "torch came first": False, "marks": marks}
    assert collect(tmp_path, "--collect-only", *arguments) == {"main": report}


def test_workers_see_no_gpu(tmp_path):
    reports = collect(tmp_path, "--numprocesses", "1", "tests/unit/test_architecture.py")
    assert reports["gw0"]["devices"] == ""
