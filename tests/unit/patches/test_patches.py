"""Every repair has a case that passes with all of them and fails without that one."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

import pytest
import torch

from megatron_patch import patches
from megatron_patch.patches import no_cuda, no_transformer_engine, optimizer_offload, saving
from tests.unit.patches import cases

PARTS = (no_cuda, no_transformer_engine, optimizer_offload, saving)
REPAIRS = [repair.make.__name__ for part in PARTS for repair in part.REPAIRS]
# Forked from a process that has torch loaded and megatron.core not: starts at once, repairs are made anew.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "tests.unit.patches.cases"])

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the repairs are for machines without a GPU")


def exit_codes(case: str, *left_out: str | None) -> list[int]:
    """How a case ends with each of these repairs left out (None: none), all at once."""
    processes = [PROCESSES.Process(target=cases.run_without, args=(repair, case)) for repair in left_out]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@without_cuda
@pytest.mark.parametrize("repair", REPAIRS)
def test_fails_without_the_repair_and_passes_with_it(repair):
    assert exit_codes(repair, repair, None) == [1, 0]


def test_importing_the_package_loads_neither_torch_nor_megatron():
    code = "import megatron_patch.config, sys; sys.exit('torch' in sys.modules or 'megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_megatron_core_imported_before_is_refused():
    code = "import megatron.core, megatron_patch"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "import megatron_patch first" in result.stderr


def test_installing_twice_changes_nothing():
    finders = list(sys.meta_path)
    patches.install()
    assert sys.meta_path == finders
