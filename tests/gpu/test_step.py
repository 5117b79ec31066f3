"""A training step on one GPU: the CPU's results, fused kernels, and Transformer Engine where it is installed.

The repairs of megatron.core that a GPU needs are tested by tests/unit/patches, which takes those of the machine.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_patch.families.llava import read_config
from megatron_patch.patches.transformer_engine import transformer_engine_fault
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs
from tests.distributed.matrix import ONE, Case, compute
from tests.distributed.ranks import run_ranks
from tests.end_to_end.scripts import ROOT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m gpu")
with_transformer_engine = pytest.mark.skipif(
    transformer_engine_fault() is not None, reason=f"needs Transformer Engine: {transformer_engine_fault()}"
)

ON_CPU = """
import json, sys
from pathlib import Path
from tests.distributed.matrix import ONE, RUNS, compute
reports = compute([(ONE, run) for run in RUNS], Path(sys.argv[1]), Path(sys.argv[2]))
print(json.dumps({run: found for (_, run), found in reports.items()}))
"""


@pytest.fixture(scope="module")
def on_cpu(mcore, tmp_path_factory) -> dict[str, list]:
    """What a process that sees no GPU reports of the tests' few steps, run by run."""
    # In front, and not alone: the dependencies may come by the same variable.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_CPU, mcore, tmp_path_factory.mktemp("cpu")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def losses(report: list) -> list[float]:
    return [loss for loss, _ in report]


@pytest.mark.parametrize(("run", "tolerance"), [("projector", 1e-4), ("everything", 1e-4), ("bf16", 5e-2)])
def test_losses_equal_the_cpus(mcore, tmp_path, on_cpu, monkeypatch, run, tolerance):
    # The tower's convolution would round its inputs to TF32 otherwise.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    case = Case("local layers", changed={"transformer_impl": "local"})
    (report,) = compute([(case, run)], mcore, tmp_path)[case.name, run]
    (expected,) = on_cpu[run]
    assert losses(report) == pytest.approx(losses(expected), abs=tolerance)


def operators(mcore, output, changed: dict) -> set[str]:
    """Names of what one training step in bf16 calls in torch."""
    config = tiny_runs.config(mcore, output, precision="bf16", transformer_impl="local", **changed)
    llava = read_config(mcore)
    _, wrapped, optimizer, _ = start_or_resume(config, llava)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train_step(wrapped, optimizer, iter(tiny_runs.batches(llava, 2)), batch_runner(config, llava))
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("flash", [True, False])
def test_attention_is_fused_where_it_is_asked_for(mcore, tmp_path, flash):
    (called,) = run_ranks(operators, ONE.cut, 1, mcore, tmp_path, {"use_flash_attn": flash})
    fused = {"aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_cudnn_attention"}
    assert bool(called & fused) == flash
    assert "aten::_scaled_dot_product_attention_math" not in called


@with_transformer_engine
def test_transformer_engine_learns_the_same(mcore, tmp_path):
    cases = [Case(name, changed={"transformer_impl": name}) for name in ("local", "transformer_engine")]
    tolerances = {"everything": 1e-4, "bf16": 5e-2}
    found = compute(itertools.product(cases, tolerances), mcore, tmp_path)
    for run, tolerance in tolerances.items():
        (local,), (engine,) = (found[case.name, run] for case in cases)
        assert losses(engine) == pytest.approx(losses(local), abs=tolerance)
