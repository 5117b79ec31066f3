"""A place in the data is values: nothing that its file names is run."""

from __future__ import annotations

import io
import random
import zipfile
from unittest import mock

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


def with_structure(structure: bytes, name: str = "data.pkl") -> bytes:
    """A position with another structure."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(SAVED)) as source, zipfile.ZipFile(file, "w") as target:
        for record in source.namelist():
            is_structure = record.endswith("/data.pkl")
            target.writestr(
                record.replace("data.pkl", name) if is_structure else record,
                structure if is_structure else source.read(record),
            )
    return file.getvalue()


HEX = b"\x80\x02c_codecs\nencode\nC\x01aX\x03\x00\x00\x00hex\x86R."
TEXT_AS_UTF_32 = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00utf-32\x86R."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_structure(HEX), "encodes as 'hex'"),
        (with_structure(TEXT_AS_UTF_32), "encodes as 'utf-32'"),
        (with_structure(b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."), "nests tuples deeper"),
        (with_structure(b"\x80\x02}r\x00\x00\x00\x10."), "a memo index"),
        (with_structure(b"\x80\x02}r\x00\x00\x00\x10.", "DATA.PKL"), "has no record data.pkl"),
        (with_structure(b"\x80\x02cmegatron.energon.state\nFlexState\n}b."), "changes a class"),
    ],
)
def test_what_takes_memory_or_the_process_is_refused(data, message):
    with pytest.raises(ValueError, match=f"not a position in the data .*{message}"):
        position.load(data)


def test_a_script_of_torch_is_not_run():
    """torch.load would hand an archive that holds constants.pkl to torch.jit.load, which asks nobody."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(SAVED)) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("archive/constants.pkl", b"\x80\x02).")
    with mock.patch("torch.jit.load") as load:
        assert repr(position.load(file.getvalue())["state"]) == repr(STATE)
    load.assert_not_called()


def test_numpys_types_stay_as_they_are():
    """A position cannot turn the bytes of all numbers of the process."""
    turn = b"(K\x03X\x01\x00\x00\x00>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb."
    data = with_structure(b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00u4\x85R" + turn)
    with pytest.raises(ValueError, match="no fingerprint"):
        position.load(data)
    assert np.dtype("u4").isnative


@pytest.mark.parametrize("tensor", [torch.empty(0, 3), torch.arange(6).view(2, 3), torch.tensor(1.5)])
def test_tensors_come_back(tensor):
    loaded = position.load(position.dump({"fingerprint": {}, "state": [tensor, tensor]}))["state"][1]
    assert loaded.dtype == tensor.dtype
    assert torch.equal(loaded, tensor)


@pytest.mark.parametrize("content", [[], {}, {"fingerprint": [], "state": 1}, {"fingerprint": {}}])
def test_other_content_is_refused(content):
    with pytest.raises(ValueError, match="has no fingerprint or no state"):
        position.load(position.dump(content))


@examples
@given(damaged(SAVED[:4000] + SAVED[-2000:]) | damaged(SAVED))
def test_a_damaged_file_is_refused_in_one_line(data):
    in_one_line(lambda: position.load(data))
