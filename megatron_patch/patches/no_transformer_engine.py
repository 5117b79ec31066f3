"""What megatron.core 0.16.1 needs where Transformer Engine and Apex are missing, on a GPU too.

The optimizer is torch's AdamW then, whose state has a `step` tensor, and DistributedOptimizer mishandles it in three
places. Line numbers are the wheel's, in megatron/core/optimizer/distrib_optimizer.py.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from megatron_patch.patches import Repair


def state_before_first_step(module: ModuleType) -> None:
    """:642 asserts that one `step` value exists: not so before the first step, nor on a rank without parameters.

    So parameters that were never stepped get the state that they would start with, and a rank that has none says 0.
    """
    if module.HAVE_APEX_OR_TE:
        return
    stock = module.DistributedOptimizer.state_dict

    @functools.wraps(stock)
    def state_dict(self):
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    offloaded = getattr(self.optimizer, "param_to_inner_param", None)
                    stepped = parameter if offloaded is None else offloaded[parameter]
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0, device=stepped.device),  # where the fused kernel looks for it
                        "exp_avg": torch.zeros_like(stepped),
                        "exp_avg_sq": torch.zeros_like(stepped),
                        **({} if offloaded is None else {"master_param": stepped}),
                    }
        if self.optimizer.state:
            return stock(self)
        inner = {key: value for key, value in self.optimizer.state_dict().items() if key != "state"}
        for group in inner["param_groups"]:
            del group["params"]
            group["step"] = 0.0
        return {"optimizer": inner}

    module.DistributedOptimizer.state_dict = state_dict


def loaded_parameter_has_no_step(module: ModuleType) -> None:
    """:940 copies every entry of the state from the loaded one, which has no `step`: KeyError. It is set elsewhere."""
    if module.HAVE_APEX_OR_TE:
        return
    stock = module.DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(stock)
    def set_states(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        return stock(self, model_param, {"step": state["step"], **tensors} if "step" in state else tensors)

    module.DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def own_step_for_each_parameter(module: ModuleType) -> None:
    """:825 puts one `step` tensor into every state: AdamW then counts each step once per parameter.

    Silent: the bias correction is wrong after a resume, and with it the losses (5.1033 instead of 5.1011).
    """
    if module.HAVE_APEX_OR_TE:
        return
    stock = module.DistributedOptimizer.load_state_dict

    @functools.wraps(stock)
    def load_state_dict(self, state_dict):
        stock(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].detach().clone()

    module.DistributedOptimizer.load_state_dict = load_state_dict


def version_of_nothing(module: ModuleType) -> None:
    """utils.py:347 compares None with a version: TypeError where the precision-aware optimizer asks. It is 0 then."""
    stock = module.get_te_version
    module.get_te_version = lambda: stock() or module.PkgVersion("0")


REPAIRS = (
    Repair(
        "megatron.core.optimizer.distrib_optimizer",
        state_before_first_step,
        "DistributedOptimizer.state_dict",
        "fe621ae6a622",
    ),
    Repair(
        "megatron.core.optimizer.distrib_optimizer",
        loaded_parameter_has_no_step,
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        "93c254228283",
    ),
    Repair(
        "megatron.core.optimizer.distrib_optimizer",
        own_step_for_each_parameter,
        "DistributedOptimizer.load_state_dict",
        "15f257b4c4f9",
    ),
    Repair("megatron.core.utils", version_of_nothing, "get_te_version", "74b250df3e19"),
)
