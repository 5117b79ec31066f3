"""A place in the data is values: nothing that its file names is run."""

from __future__ import annotations

import io
import random
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

from megatron_patch.data import position
from tests.canary import Canary
from tests.unit.properties import damaged, examples, in_one_line

RNG = SystemRngState(torch=torch.get_rng_state(), numpy=np.random.get_state(), random=random.getstate())
FLEX = FlexState(rng=b"\x00\xff", slices=[SliceState(index=3, current=5)], key=("a", 1))
DATASET = SavableDatasetState(rng=RNG, dataset_state=FLEX, sample_index=7)
STATE = SavableDataLoaderState(
    worker_states=[SavableDatasetCheckpoint(state=DATASET, offset=2)], next_worker_id=0, micro_batch_size=2
)
SAVED = position.dump({"fingerprint": {"split": "train"}, "state": STATE})


def test_states_come_back():
    """All of energon's that a loader keeps; that these are all show the loaders' own tests."""
    state = position.load(SAVED)["state"]
    assert repr(state) == repr(STATE)
    restored = state.worker_states[0].state
    assert restored.dataset_state == DATASET.dataset_state
    assert type(restored.dataset_state) is FlexState
    assert (restored.rng.numpy[1] == RNG.numpy[1]).all()
    assert restored.rng.random == RNG.random


@pytest.mark.parametrize("force", ["0", "1"])
def test_nothing_is_run(force, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    canary = tmp_path / "canary"
    for place in ({"more": Canary(canary)}, {"state": [Canary(canary)]}):
        data = position.dump({"fingerprint": {}, "state": STATE, **place})
        with pytest.raises(ValueError, match=r"not a position in the data .*getattr, which could run"):
            position.load(data)
    assert not canary.exists()


def test_a_compressed_file_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(SAVED)) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match="is compressed"):
        position.load(file.getvalue())


@pytest.mark.parametrize("content", [[], {}, {"fingerprint": [], "state": 1}, {"fingerprint": {}}])
def test_other_content_is_refused(content):
    with pytest.raises(ValueError, match="has no fingerprint or no state"):
        position.load(position.dump(content))


@examples
@given(damaged(SAVED[:4000] + SAVED[-2000:]) | damaged(SAVED))
def test_a_damaged_file_is_refused_in_one_line(data):
    in_one_line(lambda: position.load(data))
