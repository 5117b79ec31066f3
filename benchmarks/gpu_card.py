"""Phases of the check that need torch alone: what the machine is, and what it can do at most."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from inputs import SIZES
from timing import Result, timed

if TYPE_CHECKING:
    from gpu import Run

PACKAGES = ("megatron-core", "megatron-energon", "transformers", "triton", "transformer-engine", "numpy")
REPEATS = 10


def card(run: Run) -> None:
    """One row: the machine, versions, the date and the commit."""
    from gpu import ROOT

    facts = {
        "card": torch.cuda.get_device_name() if run.has_gpu else f"{platform.machine()} CPU",
        "driver": command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if run.has_gpu else "",
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if run.has_gpu else 0,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or ""),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES if version(name)},
        "size": run.size,
        "precision": run.precision,
        "steps": run.steps,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        # Where the check runs on a copy of the tree, whoever starts it tells.
        "commit": os.environ.get("COMMIT") or command("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
    }
    run.rows.add("card", **facts)


def command(*words: str) -> str:
    """The first line that a command prints; "" where there is no such command, or it fails."""
    try:
        lines = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ""
    return lines[0].strip() if lines else ""


def version(name: str) -> str:
    """Of an installed package; "" where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def ceilings(run: Run) -> None:
    """A large copy, a large matrix product, and those of a layer at the positions of one and of eight sequences."""
    device = torch.device("cuda" if run.has_gpu else "cpu")
    dtype = torch.bfloat16 if run.has_gpu else torch.float32
    num_bytes = 4 * 2**30 if run.has_gpu else 2**24
    run.rows.add("copy", tb_per_s=2 * num_bytes / copy_seconds(num_bytes, device) / 1e12, gb=num_bytes / 1e9)
    largest = 8192 if run.has_gpu else 256
    sizes, (hidden, ffn, _, heads, groups) = SIZES[run.size], SIZES[run.size].language
    width = hidden // heads
    products = {"square": (largest, largest, largest)}
    for rows in (sizes.longest, 8 * sizes.longest):
        products[f"qkv, {rows} rows"] = (rows, hidden, (heads + 2 * groups) * width)
        products[f"proj, {rows} rows"] = (rows, heads * width, hidden)
        products[f"fc1, {rows} rows"] = (rows, hidden, 2 * ffn)
        products[f"fc2, {rows} rows"] = (rows, ffn, hidden)
    for name, (m, k, n) in products.items():
        left = torch.randn(m, k, device=device, dtype=dtype)
        right = torch.randn(n, k, device=device, dtype=dtype)
        seconds = median_seconds(lambda left=left, right=right: torch.nn.functional.linear(left, right))
        run.rows.add(name, tflops=2 * m * k * n / seconds / 1e12, m=m, k=k, n=n)


def copy_seconds(num_bytes: int, device: torch.device) -> float:
    """Of a copy within the device's memory, which reads and writes so many bytes."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source))


def median_seconds(function: Callable[[], object]) -> float:
    """Of a call, after three that are not measured."""
    result = Result()
    for index in range(3 + REPEATS):
        with timed(result if index >= 3 else Result()):
            function()
    return statistics.median(result.device_seconds or result.seconds)
