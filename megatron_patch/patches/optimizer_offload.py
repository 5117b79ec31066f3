"""What megatron.core 0.16.1 does wrong when optimizer states are kept on the CPU (HybridDeviceOptimizer), everywhere.

Line numbers are the wheel's, in megatron/core/optimizer/. States of fp32 models are the plain kind; those of 16 bits
go the way of the precision-aware optimizer, whose fp32 weights are on the CPU too.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from megatron_patch.patches import Repair

SETTINGS = ("offload_fraction", "cpu_optimizer_cls", "gpu_optimizer_cls", "param_update_in_fp32")
SETTINGS += ("pin_cpu_grads", "pin_cpu_params", "overlap_cpu_optimizer_d2h_h2d")


def leaves_of_fp32_models(module: ModuleType) -> None:
    """distrib_optimizer.py:420 gives views of fp32 weights that autograd follows: "can't optimize a non-leaf"."""
    stock = module.DistributedOptimizer._build_model_and_main_param_groups.__func__

    @functools.wraps(stock)
    def build(cls, gbuf_ranges, param_gbuf_map, opt_group_ranges, config):
        with torch.set_grad_enabled(not config.optimizer_cpu_offload):
            return stock(cls, gbuf_ranges, param_gbuf_map, opt_group_ranges, config)

    module.DistributedOptimizer._build_model_and_main_param_groups = classmethod(build)


def loaded_weights_of_fp32_models(module: ModuleType) -> None:
    """cpu_offloading/hybrid_optimizer.py:373 looks for a fp32 copy of what is fp32 already: KeyError after a load."""

    def update(self) -> None:
        for parameter, state in self.state.items():
            self.param_to_inner_param[parameter].data.copy_(state["master_param"])

    module.HybridDeviceOptimizer._update_fp32_params_by_new_state = update


def loaded_state_has_no_master(module: ModuleType) -> None:
    """distrib_optimizer.py:940 copies every entry of a fp32 model's state, and one is the weight by another name."""
    stock = module.DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(stock)
    def set_states(self, model_param, tensors):
        if isinstance(self.optimizer, module.HybridDeviceOptimizer):
            tensors = {"master_param": tensors["param"], **tensors}
        return stock(self, model_param, tensors)

    module.DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def settings_are_no_state(module: ModuleType) -> None:
    """distrib_optimizer.py:675 saves settings with the state, two of them classes, which no safe load accepts.

    Without them a run can go on with and without offload.
    """
    stock = module.DistributedOptimizer.state_dict

    @functools.wraps(stock)
    def state_dict(self):
        state = stock(self)
        for group in state["optimizer"]["param_groups"]:
            for name in SETTINGS:
                group.pop(name, None)
        return state

    module.DistributedOptimizer.state_dict = state_dict


REPAIRS = (
    Repair(
        "megatron.core.optimizer.distrib_optimizer",
        leaves_of_fp32_models,
        "DistributedOptimizer._build_model_and_main_param_groups",
        "1b9f0ec06718",
    ),
    Repair(
        "megatron.core.optimizer.cpu_offloading.hybrid_optimizer",
        loaded_weights_of_fp32_models,
        "HybridDeviceOptimizer._update_fp32_params_by_new_state",
        "1f54baa10ab1",
    ),
    Repair(
        "megatron.core.optimizer.distrib_optimizer",
        loaded_state_has_no_master,
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        "93c254228283",
    ),
    Repair(
        "megatron.core.optimizer.distrib_optimizer",
        settings_are_no_state,
        "DistributedOptimizer.state_dict",
        "fe621ae6a622",
    ),
)
