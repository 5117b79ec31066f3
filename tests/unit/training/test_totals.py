"""What a global batch reports."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from megatron_patch.training.totals import COUNTS, Done, Totals, Unlearned, report_spike


def totals(loss: float, count: int) -> Totals:
    counts = dict.fromkeys(COUNTS, count)
    return Totals(loss=loss, data_seconds=count / 10, **counts)


def test_mean_of_totals_weighs_by_labels():
    mean = Totals.mean([totals(1.0, 10), totals(4.0, 30)])
    assert mean == totals(3.25, 40)
    assert mean.data_seconds == 4.0


@pytest.mark.parametrize("loss", [19.9, 20.1])
def test_a_spike_names_the_samples_of_its_highest_micro_batch(caplog, monkeypatch, loss):
    monkeypatch.setattr(logging.getLogger("megatron_patch"), "propagate", True)
    done = [Done(keys, {"num_labels": 4}) for keys in (["a", "b"], ["c", "d"])]
    report_spike(loss, [1.9, 2.0, 50.0], done, [8.0, 200.0])
    said = ["loss 20.1000 is more than 10 times the usual one: 50.0000 in samples c, d"]
    assert caplog.messages == (said if loss > 20 else [])


def test_a_run_without_pictures_that_trains_the_projector_alone_says_so_and_ends(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_patch"), "propagate", True)
    text, pictures = replace(totals(1.0, 4), num_images=0), totals(1.0, 4)
    unlearned = Unlearned(trains_projector_alone=True)
    for iteration, found in enumerate([text] * 19 + [pictures] + [text] * 19, 1):
        unlearned.check(iteration, found)
    (record,) = caplog.records
    assert "iteration 1: none of its 4 samples has an image" in record.message
    with pytest.raises(ValueError, match=r"iteration 40: none of its 4 samples .*as in the 19 before it; give data"):
        unlearned.check(40, text)


def test_a_run_without_pictures_that_trains_more_goes_on(caplog):
    unlearned = Unlearned(trains_projector_alone=False)
    for iteration in range(50):
        unlearned.check(iteration, replace(totals(1.0, 4), num_images=0))
    assert not caplog.records
