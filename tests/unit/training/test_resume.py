"""Extra states of Transformer Engine, whose layers a mock is: pickles that only fp8 needs, and local layers lack."""

from __future__ import annotations

import pickle

import pytest
import torch

from megatron_patch.families.llava import read_config
from megatron_patch.training import resume
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.resume import Progress
from megatron_patch.training.saving import Saver
from tests import tiny_runs
from tests.canary import Canary

pytestmark = pytest.mark.usefixtures("one_process")


class Run:
    """A run, as far as checkpoints go; `extra`: what the last norm, as Transformer Engine's, has as extra state."""

    def __init__(self, mcore, output, extra: object = None, is_local: bool = False, fp8: str | None = None) -> None:
        self.config = tiny_runs.config(mcore, output)
        self.chunks, _, self.optimizer, _ = start_or_resume(self.config, read_config(mcore), None)
        self.chunks[0].config.fp8 = fp8
        self.norm = self.chunks[0].language_model.decoder.final_layernorm
        self.taken: list[object] = []
        if not is_local:
            methods = {"get_extra_state": lambda norm: extra, "set_extra_state": lambda norm, s: self.taken.append(s)}
            self.norm.__class__ = type("NormOfTransformerEngine", (type(self.norm),), methods)

    def save(self) -> None:
        Saver(self.config, self.chunks, self.optimizer).save(Progress(1, 0), None)

    def load(self) -> list[object]:
        """The extra states that the norm was given; its weight is then what was saved."""
        with torch.no_grad():
            before = self.norm.weight.clone()
            self.norm.weight.zero_()
        progress = resume.load(resume.find(self.config), self.chunks, self.optimizer)
        assert progress.iteration == 1
        assert torch.equal(self.norm.weight, before)
        return self.taken


def test_a_run_of_local_layers_goes_on_with_others_and_back(mcore, tmp_path):
    Run(mcore, tmp_path, is_local=True).save()
    other = Run(mcore, tmp_path)
    assert other.load() == []
    other.save()
    assert Run(mcore, tmp_path, is_local=True).load() == []


def test_with_fp8_too(mcore, tmp_path):
    Run(mcore, tmp_path, is_local=True).save()
    assert Run(mcore, tmp_path, fp8="hybrid").load() == []


def test_fp8_takes_its_scales(mcore, tmp_path):
    scales = {"scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}
    extra = torch.frombuffer(bytearray(pickle.dumps(scales)), dtype=torch.uint8)
    Run(mcore, tmp_path, extra=extra, fp8="hybrid").save()
    (taken,) = Run(mcore, tmp_path, fp8="hybrid").load()
    assert torch.equal(taken, extra)


@pytest.mark.parametrize("is_local", [True, False])
def test_no_pickle_is_loaded_without_fp8(mcore, tmp_path, is_local):
    canary = tmp_path / "canary"
    Run(mcore, tmp_path, extra=Canary(canary)).save()
    assert Run(mcore, tmp_path, is_local=is_local).load() == []
    assert not canary.exists()


def test_fp8_loads_no_other_pickle(mcore, tmp_path):
    """Neither in the file, nor in the tensor that Transformer Engine unpickles."""
    canary = Canary(tmp_path / "canary")
    for extra in (canary, torch.frombuffer(bytearray(pickle.dumps(canary)), dtype=torch.uint8)):
        Run(mcore, tmp_path, extra=extra, fp8="hybrid").save()
        other = Run(mcore, tmp_path, fp8="hybrid")
        with pytest.raises(ValueError, match=r"iter_0000001: .*could run code"):
            other.load()
        assert other.taken == []
        assert not (tmp_path / "canary").exists()


def test_tensors_of_another_model_are_refused(mcore, tmp_path):
    """torch gathers what ranks raise into an exception that is no Exception."""
    Run(mcore, tmp_path).save()
    other = Run(mcore, tmp_path)
    other.norm.weight = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="iter_0000001: does not fit this run"):
        other.load()


def test_a_missing_weight_is_refused(mcore, tmp_path):
    Run(mcore, tmp_path).save()
    other = Run(mcore, tmp_path)
    other.norm.register_parameter("bias", torch.nn.Parameter(torch.zeros_like(other.norm.weight)))
    with pytest.raises(ValueError, match=r"does not fit this run .*final_layernorm.bias"):
        other.load()
