"""The norm of all weights, of which the frozen ones are read once."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megatron_patch.training.params_norm import params_norm


@pytest.fixture
def model(one_process) -> torch.nn.Module:
    """A frozen layer of two weights and a trained one."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    model[0].requires_grad_(False)
    for parameter in model.parameters():
        parameter.tensor_model_parallel = True  # none is a copy of another rank's
    return model


def expected(*models: torch.nn.Module) -> float:
    """Over all weights as one vector."""
    return torch.cat([weight.flatten() for model in models for weight in model.parameters()]).norm().item()


def test_frozen_weights_are_read_once(model, monkeypatch):
    read = mock.Mock(side_effect=torch._foreach_norm)
    monkeypatch.setattr(torch, "_foreach_norm", read)
    for weights in (4, 2, 2):
        read.reset_mock()
        assert params_norm([model]) == pytest.approx(expected(model), rel=1e-6)
        assert sum(len(call.args[0]) for call in read.call_args_list) == weights
        with torch.no_grad():
            model[1].weight.mul_(3)


@pytest.mark.parametrize("how", ["loaded", "written", "replaced", "trained"])
def test_frozen_weights_that_have_changed_are_read_again(model, how):
    params_norm([model])
    new = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    if how == "loaded":
        model.load_state_dict(new)
    elif how == "written":
        with torch.no_grad():
            model[0].weight.fill_(2)
    elif how == "replaced":
        model[0].weight.data = new["0.weight"]
    else:
        model.requires_grad_(True)
    assert params_norm([model]) == pytest.approx(expected(model), rel=1e-6)


def test_models_do_not_share_what_is_known(model):
    other = torch.nn.Linear(3, 4).requires_grad_(False)
    other.weight.tensor_model_parallel = other.bias.tensor_model_parallel = True
    assert params_norm([model, other]) == pytest.approx(expected(model, other), rel=1e-6)
    assert params_norm([other]) == pytest.approx(expected(other), rel=1e-6)
