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


def copies_of_own_states(module: ModuleType) -> None:
    """__init__.py:336 copies all trained weights on every rank, distrib_optimizer.py:603 the rank's own.

    Only the second optimizer steps: the first is built without copies.
    """

    class WithoutCopies(module.HybridDeviceOptimizer):
        def _init_sub_optimizers(self) -> None: ...

    module.HybridDeviceOptimizer = WithoutCopies


def parameters_on_the_device(module: ModuleType) -> None:
    """All parameters count as the device's, and a part of them has copies that are stepped instead: the CPU's.

    cpu_offloading/hybrid_optimizer.py:248-296 sorts by `is_cuda`: without CUDA none would have, KeyError in :90. With
    it, a 16-bit copy is pinned and dropped (:274), which torch keeps, and the fp32 one that is copied back after each
    step is not; and after a load (:448) there are two of each for a time, though the state holds the weight.
    """

    def sort(self, offload_fraction: float) -> tuple[list[dict], list[dict], dict, dict, dict]:
        wanted = offload_fraction * sum(p.numel() for group in self.param_groups for p in group["params"])
        before = vars(self).get("param_to_inner_param", {})
        count, cpu_groups, device_groups, copies, in_fp32 = 0, [], [], {}, {}
        for group in self.param_groups:
            on_cpu, on_device = [], []
            for parameter in group["params"]:
                goes, becomes_fp32 = count < wanted, self.param_update_in_fp32 and parameter.dtype != torch.float32
                stepped = parameter
                if self.state.get(parameter) and parameter in before:
                    stepped = before[parameter]
                elif goes:
                    stepped = _copy_on_cpu(parameter, becomes_fp32, self.pin_cpu_params)
                elif becomes_fp32:
                    stepped = parameter.detach().float()
                if becomes_fp32:
                    in_fp32[parameter] = stepped
                if goes:
                    copies[parameter] = stepped
                    count += parameter.numel()
                (on_cpu if goes else on_device).append(stepped)
            cpu_groups += [{**group, "params": on_cpu}] if on_cpu else []
            device_groups += [{**group, "params": on_device}] if on_device else []
        return cpu_groups, device_groups, copies, {copy: own for own, copy in copies.items()}, in_fp32

    module.HybridDeviceOptimizer._get_sub_optimizer_param_groups = sort


def _copy_on_cpu(parameter: torch.Tensor, in_fp32: bool, pinned: bool) -> torch.Tensor:
    """A weight for the CPU's optimizer; pinned where a device copies it back."""
    dtype = torch.float32 if in_fp32 else parameter.dtype
    copy = torch.empty(parameter.shape, dtype=dtype, device="cpu", pin_memory=pinned and parameter.is_cuda)
    return copy.copy_(parameter.detach())


def states_where_their_weights_are(module: ModuleType) -> None:
    """cpu_offloading/hybrid_optimizer.py:366 moves loaded states by the optimizer's class, which without Transformer
    Engine is the same on the GPU: its states would be on the CPU, and the next step fails."""

    def move(self) -> None:
        for optimizer in self.sub_optimizers:
            for stepped, state in optimizer.state.items():
                parameter = self.inner_param_to_orig_param.get(stepped, stepped)
                for name, value in state.items():
                    if isinstance(value, torch.Tensor):
                        self.state[parameter][name] = state[name] = value.to(stepped.device)

    module.HybridDeviceOptimizer._move_new_state_to_right_device = move


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
        "megatron.core.optimizer",
        copies_of_own_states,
        "_get_megatron_optimizer_based_on_param_groups",
        "34bc6add4c25",
    ),
    Repair(
        "megatron.core.optimizer.cpu_offloading.hybrid_optimizer",
        parameters_on_the_device,
        "HybridDeviceOptimizer._get_sub_optimizer_param_groups",
        "dc36f8e0ea82",
    ),
    Repair(
        "megatron.core.optimizer.cpu_offloading.hybrid_optimizer",
        states_where_their_weights_are,
        "HybridDeviceOptimizer._move_new_state_to_right_device",
        "b279efe6d638",
    ),
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
