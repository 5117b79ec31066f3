"""However the model and the batch are cut, losses and gradient norms are those of one process."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from megatron_patch.config.train import Config, Parallel
from megatron_patch.families.llava import read_config
from megatron_patch.training import optimizer
from megatron_patch.training.loop import build_model
from tests import tiny_runs
from tests.distributed.matrix import CASES, ONE, RUNS, TOLERANCE, Case, compute, differences
from tests.distributed.ranks import run_ranks

STEPS = 3
LAYOUTS = {
    "projector": ("one process", "TP2+SP", "PP2", "CP2", "DP2+DO", "recompute full"),
    "everything": [case.name for case in (ONE, *CASES) if case.name != "TP2xPP2"],
    "bf16": ("one process", "TP2+SP", "DP2+DO"),
}
"""Of the matrix's cases, those in which a run is computed here; `make matrix` computes all of them."""
PAIRS = [(case, run) for case in (ONE, *CASES) for run in RUNS if case.name in LAYOUTS[run]]


@pytest.fixture(scope="module")
def reports_of(mcore, tmp_path_factory):
    """A case's reports in a run. All cases of a number of processes are computed at once, on the same ones."""

    @functools.cache
    def compute_all(world_size: int) -> dict:
        pairs = [(case, run) for case, run in PAIRS if case.world_size == world_size]
        return compute(pairs, mcore, tmp_path_factory.mktemp("matrix"), STEPS)

    return lambda case, run: compute_all(case.world_size)[case.name, run]


@pytest.mark.parametrize("run", ["projector", "everything"])
def test_one_process_learns(reports_of, run):
    (report,) = reports_of(ONE, run)
    assert report[-1][0] < report[0][0] - (0.01 if run == "projector" else 0.5)


@pytest.mark.parametrize(("case", "run"), PAIRS, ids=[f"{case.name}-{run}" for case, run in PAIRS])
def test_equals_one_process(reports_of, case, run):
    (expected,) = reports_of(ONE, run)
    assert max(differences(reports_of(case, run), expected)) <= TOLERANCE[run]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_are_near_fp32(mcore, tmp_path, reports_of, monkeypatch, precision):
    """fp16 at a loss scale at which no gradient overflows, so that no step is left out."""
    monkeypatch.setattr(optimizer, "FIRST_LOSS_SCALE", 2.0**8)
    case = Case(precision, changed={"precision": precision})
    (report,) = compute([(case, "projector")], mcore, tmp_path, STEPS)[precision, "projector"]
    (expected,) = reports_of(ONE, "projector")
    assert [loss for loss, _ in report] == pytest.approx([loss for loss, _ in expected], abs=1e-2)


def new_layers(config: Config) -> list[torch.Tensor]:
    """A weight of each of this stage's layers, as they are drawn."""
    (chunk,) = build_model(config, read_config(config.model.description))
    return [layer.mlp.linear_fc2.weight.detach() for layer in chunk.language_model.decoder.layers]


def test_new_layers_differ_on_all_stages(mcore, tmp_path):
    cut = Parallel(pipeline_model_parallel_size=2)
    config = tiny_runs.config(None, tmp_path, parallel=cut, model_config=mcore)
    layers = [weight for stage in run_ranks(new_layers, cut, 2, config) for weight in stage]
    assert len(layers) == 4
    for one, other in itertools.combinations(layers, 2):
        assert not torch.equal(one, other)
