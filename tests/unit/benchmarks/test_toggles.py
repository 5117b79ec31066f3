"""A toggle changes the live model and puts it back; one that finds nothing to change says so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


def contestant(**settings):
    """What toggles look at of ours: a language model of two modules that share their settings, and an optimizer."""
    model, config = torch.nn.Sequential(torch.nn.Linear(2, 2)), SimpleNamespace(**settings)
    for module in model.modules():
        module.config = config
    adam = torch.optim.AdamW(model.parameters(), fused=settings.get("fused", False))
    return SimpleNamespace(language_model=model, config=config, torch_optimizers=lambda: [adam], adam=adam)


def test_a_setting_is_put_back_after_an_error():
    from toggles import setting

    ours = contestant(bias_activation_fusion=True)

    def use() -> None:
        with setting("bias_activation_fusion", False)(ours):
            assert not ours.language_model.config.bias_activation_fusion
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert ours.language_model.config.bias_activation_fusion


@pytest.mark.parametrize(("settings", "said"), [({}, "no fusion here"), ({"fusion": False}, "fusion is False already")])
def test_nothing_to_turn_off(settings, said):
    from toggles import Absent, setting

    with pytest.raises(Absent, match=said), setting("fusion", False)(contestant(**settings)):
        pass


def test_megatron_cores_rotary_embedding_comes_back_for_the_time(monkeypatch):
    from megatron.core.models.common.embeddings import rope_utils
    from toggles import Absent, is_replaced, stock_module, stock_rotary_embedding

    name = "_apply_rotary_pos_emb_bshd"
    monkeypatch.setattr(rope_utils, name, getattr(stock_module(rope_utils), name))
    for other in ("_apply_rotary_pos_emb_thd",):
        monkeypatch.setattr(rope_utils, other, getattr(stock_module(rope_utils), other))
    with pytest.raises(Absent), stock_rotary_embedding(None):
        pass

    def mended(*arguments: object) -> None: ...

    monkeypatch.setattr(rope_utils, name, mended)
    with stock_rotary_embedding(None):
        assert not is_replaced(rope_utils, name)
        query, angles = torch.randn(5, 2, 3, 8), torch.zeros(5, 1, 1, 8)
        assert torch.equal(rope_utils._apply_rotary_pos_emb_bshd(query, angles), query)
    assert rope_utils._apply_rotary_pos_emb_bshd is mended


def test_adam_steps_by_foreach_for_the_time():
    from toggles import Absent, foreach_adam

    ours = contestant(fused=True)
    with foreach_adam(ours):
        (group,) = ours.adam.param_groups
        assert (group["fused"], group["foreach"]) == (False, True)
    assert group["fused"]
    with pytest.raises(Absent), foreach_adam(contestant(fused=False)):
        pass
