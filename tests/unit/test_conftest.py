"""Tests see no GPU, nor do the processes that they start, unless they are those that need one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import conftest

ROOT = Path(__file__).parents[2]
# What each process of a test run, xdist's workers too, sees when it is configured.
PLUGIN = """
import json, os, sys
from pathlib import Path

def pytest_configure(config):
    config.early = "torch" in sys.modules

def pytest_collection_finish(session):
    name = os.environ.get("PYTEST_XDIST_WORKER", "main")
    report = {"devices": os.environ["CUDA_VISIBLE_DEVICES"], "torch came first": session.config.early}
    Path(__file__).with_name(name + ".json").write_text(json.dumps(report))
"""


@pytest.mark.parametrize(
    ("mark", "arguments", "devices"),
    [
        ("", ["tests"], ""),
        ("", ["tests/unit/model/test_groups.py"], ""),
        ("gpu", ["tests"], "0"),
        ("", ["tests/unit/test_architecture.py", "tests/gpu/test_run.py::test_train_and_resume"], "0"),
    ],
    ids=["all", "a unit test", "by mark", "by path"],
)
def test_the_gpu_is_visible_where_it_is_asked_for(monkeypatch, mark, arguments, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    option, where = SimpleNamespace(markexpr=mark), SimpleNamespace(dir=ROOT)
    conftest.pytest_configure(SimpleNamespace(option=option, invocation_params=where, args=arguments))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == devices


def test_what_needs_a_gpu_is_marked():
    marked = []
    paths = [ROOT / "tests/gpu/test_run.py", ROOT / "tests/unit/test_setup.py"]
    conftest.pytest_collection_modifyitems(
        [SimpleNamespace(path=path, add_marker=lambda mark, path=path: marked.append((path, mark))) for path in paths]
    )
    assert marked == [(paths[0], pytest.mark.gpu)]


def test_no_process_of_a_test_run_sees_a_gpu(tmp_path):
    (tmp_path / "reporting.py").write_text(PLUGIN)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    options = "-p reporting -p no:cacheprovider --numprocesses 1 tests/unit/test_setup.py".split()
    subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=ROOT,
        env={**environment, "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": path},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    reports = {report.stem: json.loads(report.read_text()) for report in tmp_path.glob("*.json")}
    assert reports["gw0"] == {"devices": "", "torch came first": False}
