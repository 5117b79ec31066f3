"""Every repair has a case that passes with all of them and fails without that one."""

from __future__ import annotations

import importlib.util
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest

from megatron_patch import patches
from tests.forked import PROCESSES, in_server
from tests.unit.patches import cases

REPAIRS = [repair.make.__name__ for repair in patches.needed()]  # on this machine, with or without a GPU


def passes(case: str) -> bool:
    """Whether a case passes with all repairs, in a process forked from this one, which loads megatron.core but once."""
    from megatron_patch.training import loop  # noqa: F401

    process = multiprocessing.get_context("fork").Process(target=cases.run_without, args=(None, case))
    process.start()
    process.join(120)
    return process.exitcode == 0


def exit_codes(case: str, *left_out: str | None, run=cases.run_without) -> list[int]:
    """How a case ends with each of these repairs left out (None: none), all at once."""
    processes = [PROCESSES.Process(target=run, args=(repair, case)) for repair in left_out]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="some repairs are for machines without it"
)
@pytest.mark.parametrize("repair", REPAIRS)
def test_fails_without_the_repair_and_passes_with_it(repair):
    assert exit_codes(repair, repair) == [1]
    assert in_server(passes, repair)


def test_without_a_compiler_nothing_is_compiled_for_a_gpu():
    repair = "no_compilation_without_a_compiler"
    assert exit_codes(repair, repair, None, run=cases.run_with_a_gpu_and_no_compiler) == [1, 0]


def test_offloaded_weights_are_pinned_once():
    assert exit_codes("parameters_on_the_device_are_pinned", "parameters_on_the_device") == [1]
    assert in_server(passes, "parameters_on_the_device_are_pinned")


def test_importing_the_package_loads_neither_torch_nor_megatron():
    code = "import megatron_patch.config.train, sys; sys.exit('torch' in sys.modules or 'megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_megatron_core_imported_before_is_refused():
    code = "import sys; sys.modules['megatron.core'] = sys; import megatron_patch"  # a mock, which takes no seconds
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "import megatron_patch first" in result.stderr


def test_a_repair_of_what_another_version_has_no_more_is_left_out(caplog):
    """The function is another one, or gone. Where it is as it was, in the installed version, the repair is made."""
    from megatron.core.optimizer import distrib_optimizer as module

    stock = module.DistributedOptimizer.load_state_dict
    (repair,) = (repair for repair in patches.needed() if repair.make.__name__ == "own_step_for_each_parameter")
    others = [replace(repair, function=f"DistributedOptimizer.{name}") for name in ("state_dict", "gone")]
    patches._Loader(mock.Mock(), others).exec_module(module)
    assert module.DistributedOptimizer.load_state_dict is stock
    assert [message.partition(" is not what ")[0] for message in caplog.messages] == [
        f"{module.__name__}.{other.function}" for other in others
    ]
    assert repair.fits(module)


def test_installing_twice_changes_nothing():
    finders = list(sys.meta_path)
    patches.install()
    assert sys.meta_path == finders
