"""Phases of the check that start other commands: the tests, and the compiler for Transformer Engine's torch part."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu import Run

ARCHIVE = "te.tar.xz"
"""What `benchmarks/gpu_wheels.sh` packs of Transformer Engine, in the folder of --engine."""


def tests(run: Run) -> None:
    """The tests that need a GPU, and those of megatron.core's repairs, which are others on a GPU."""
    add_tests(run, "tests on a GPU", ["tests/gpu", "tests/unit/patches"], run.limit)


def add_tests(run: Run, row: str, arguments: list[str], seconds: float) -> None:
    """A row with the number of tests that passed, failed and were skipped, and the names of those that failed."""
    from gpu import ROOT

    report = run.folder / "junit.xml"
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-n", "4", f"--junitxml={report}"]
    code, output = run_command([*command, *arguments], ROOT, seconds)
    if not report.exists():
        run.rows.add(row, problem=f"pytest ended with exit code {code}: {output[-200:]}", failed=True)
        return
    add_junit(run, row, report)


def add_junit(run: Run, row: str, report: Path) -> None:
    """The row of a file that pytest wrote."""
    cases = ET.parse(report).getroot().findall(".//testcase")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = [f"{case.get('classname')}.{case.get('name')}" for case in failed]
    problem = f"failed: {', '.join(names)}" if names else "" if cases else "no test was found"
    counts = {"passed": len(cases) - len(failed) - len(skipped), "failures": len(failed), "skipped": len(skipped)}
    run.rows.add(row, problem, failed=bool(problem), **counts, seconds=float(sum_seconds(cases)))


def sum_seconds(cases: list[ET.Element]) -> float:
    """Of all tests, one after another."""
    return sum(float(case.get("time", 0)) for case in cases)


def engine_build(run: Run) -> None:
    """Unpack Transformer Engine where it was carried to, and compile its torch part for this Python and torch."""
    archive = run.engine / ARCHIVE
    if not archive.exists():
        run.rows.add("build", problem=f"not run: {archive} is not there; benchmarks/gpu_wheels.sh makes it")
        return
    with tarfile.open(archive) as tar:
        tar.extractall(run.engine, filter="data")
    (sources,) = run.engine.glob("transformer_engine_torch-*.tar.gz")
    start = time.perf_counter()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    environment = {
        "NVTE_FRAMEWORK": "pytorch",
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",  # it would look for a compiled one on the net
        "MAX_JOBS": str(os.cpu_count()),
        "CPATH": os.pathsep.join(map(str, header_folders())),
    }
    code, output = run_command(
        [*command, "--target", str(run.engine), str(sources)], run.folder, run.limit, environment
    )
    problem = f"pip ended with exit code {code}: {output[-250:]}" if code else ""
    (run.out / "engine-build.txt").write_text(output)
    run.rows.add("build", problem, failed=bool(code), seconds=time.perf_counter() - start, jobs=os.cpu_count())


def header_folders() -> list[Path]:
    """Headers of cuDNN and NCCL, which come with torch's packages and not with the CUDA toolkit; and CUDA's last."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    found = [packages / name / "include" for name in ("cudnn", "nccl", "cu13")]
    return [folder for folder in found if folder.is_dir()]


def run_command(
    words: list[str], folder: Path, seconds: float, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and output of a command; 124 when it took longer than `seconds`."""
    process = subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate()
        return 124, output
    return process.returncode, output
