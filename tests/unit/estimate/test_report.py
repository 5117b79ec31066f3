"""What `--plan` prints of a run, and which settings it suggests."""

from __future__ import annotations

from unittest import mock

import pytest

from megatron_patch.config.train import Parallel
from megatron_patch.estimate import memory
from megatron_patch.estimate.cards import CARDS
from megatron_patch.estimate.memory import GIB, plan
from megatron_patch.estimate.report import ROOM, line, report, suggest
from tests.unit.config.test_train import LLAVA
from tests.unit.estimate.test_time import stage_one

H100 = CARDS["H100"]
TP4 = {"cut": Parallel(tensor_model_parallel_size=4), "recompute": "true"}


def test_a_frozen_7b_needs_no_tensor_parallelism():
    suggestion = suggest(stage_one(**TP4), LLAVA, 4, H100, H100.memory)
    assert suggestion.config == stage_one(micro_batch_size=8, recompute="none")
    assert suggestion.ratio < 0.5
    assert suggestion.memory == plan(suggestion.config, LLAVA, 4)[0].total < ROOM * H100.memory
    text = line(suggestion, H100.memory, "an H100's")
    assert text.startswith("TP 1, PP 1, CP 1, micro batch 8, AC none fits (")
    assert text.endswith("of the time; the arguments given are used")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("settings", "gibibytes"),
    [({"micro_batch_size": 8}, 80), (TP4, 3)],
    ids=["as fast as can be", "no room"],
)
def test_nothing_is_suggested(settings, gibibytes):
    assert suggest(stage_one(**settings), LLAVA, 4, H100, gibibytes * GIB) is None


@pytest.mark.parametrize("gibibytes", [12, 24, 40])
def test_what_is_suggested_fits(gibibytes):
    suggestion = suggest(stage_one(**TP4), LLAVA, 4, H100, gibibytes * GIB)
    assert suggestion.memory <= ROOM * gibibytes * GIB
    assert suggestion.config.parallel.tensor_model_parallel_size > 1 or gibibytes >= 24


def test_suggestions_can_run():
    """Virtual stages, sequence parallelism and recomputation's details go where they cannot be."""
    cut = Parallel(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
    )
    given = stage_one(cut, recompute="full", recompute_num_layers=4)
    suggestion = suggest(given, LLAVA, 4, H100, H100.memory)
    assert suggestion.config.parallel == Parallel()
    assert suggestion.config.training.recompute_num_layers is None


def test_both_are_printed_beside_each_other():
    lines = report(stage_one(**TP4), LLAVA, 4).splitlines()
    heads = [line.partition(", CP")[0] for line in lines if line.startswith("TP")]
    assert heads == ["TP 4, PP 1", "TP 4, PP 1", "TP 1, PP 1", "TP 1, PP 1", "TP 1, PP 1"]
    (said,) = (line for line in lines if line.startswith("predicted time on 4 GPUs"))
    assert "never compared with a GPU" in said
    assert "launches" in next(line for line in lines if line.startswith("TP 4"))
    assert len(report(stage_one(micro_batch_size=8), LLAVA, 4).splitlines()) == 3 + 2 + 2


def test_weights_are_listed_once_for_all_settings_that_are_compared(monkeypatch):
    """A run on GPUs compares hundreds before it starts; to list a model's weights takes milliseconds."""
    memory._weights.cache_clear()
    listed = mock.Mock(side_effect=memory.rows)
    monkeypatch.setattr(memory, "rows", listed)
    given = stage_one(Parallel(tensor_model_parallel_size=8, pipeline_model_parallel_size=8))
    assert suggest(given, LLAVA, 64, H100, H100.memory) is not None
    assert listed.call_count <= 2 * 4  # TP 1, 2, 4, 8, with and without stages


def test_what_does_not_fit_is_marked():
    lines = report(stage_one(micro_batch_size=128, global_batch_size=512), LLAVA, 4).splitlines()
    assert next(line for line in lines if " H100 " in line).endswith("needs more than its 80 GiB")
