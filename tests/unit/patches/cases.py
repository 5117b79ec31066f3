"""What each repair is for, as code that fails without it. Run in processes of their own: repairs are made on import."""

from __future__ import annotations

import io
import multiprocessing
import os
from pathlib import Path
from unittest import mock

import torch

import megatron_patch  # noqa: F401  (installs the repairs)
from megatron_patch import patches
from tests.unit.patches.tiny_core import kernels, make_optimizer, metadata, refuses_objects, save_and_load, start, train


def run_without(repair: str | None, case: str) -> None:
    """Leave one repair out (None: none), then run a case."""
    everything = patches.needed
    patches.needed = lambda: [r for r in everything() if r.make.__name__ != repair]
    globals()[case]()


def run_with_a_gpu_and_no_compiler(repair: str | None, case: str) -> None:
    """The same where torch sees a GPU, which is a mock, and nobody finds a compiler."""
    torch.cuda.is_available = lambda: True
    os.environ["PATH"] = ""
    os.environ.pop("CC", None)
    run_without(repair, case)


def torch_without_cuda() -> None:
    """Anything at all; and torch itself is what it was for others."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    start()
    assert RotaryEmbedding(kv_channels=8, rotary_percent=1.0)(4).device.type == "cpu"
    with torch.device("meta"):
        assert torch.arange(3).device.type == "meta"


def current_device() -> None:
    """An allocation that asks for the device."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    start()
    assert RotaryEmbedding(kv_channels=8, rotary_percent=1.0)(4).device.type == "cpu"


def synchronisation() -> None:
    """A timer waits for the device."""
    from megatron.core.timers import Timers

    timer = Timers(log_level=0, log_option="all")("case", log_level=0)
    timer.start()
    timer.stop()


def random_numbers() -> None:
    """The tracker seeds the device."""
    start()


def random_number_tracker() -> None:
    """Drawing inside a fork: the tracker's own numbers, and the outer ones go on as if nothing had been drawn."""
    from megatron.core import tensor_parallel

    start()
    torch.manual_seed(5)
    outer = torch.get_rng_state()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        first = torch.rand(3)
    assert torch.equal(outer, torch.get_rng_state())
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert not torch.equal(first, torch.rand(3))


def factories() -> None:
    """A norm of gradients is put into a tensor with a literal device."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3.0)
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=4.0)


def moves() -> None:
    """CLIPViTModel moves its positions to the device when it is built."""
    import megatron.core  # noqa: F401

    assert torch.ones(1).cuda().device.type == "cpu"
    assert torch.ones(1).to("cuda").device.type == "cpu"
    assert torch.ones(1).to(device="cuda", dtype=torch.float64).dtype == torch.float64
    assert torch.nn.Linear(1, 1).cuda().weight.device.type == "cpu"


def type_names() -> None:
    """The distributed optimizer sorts parameters by the text of their type."""
    make_optimizer()


def no_compilation() -> None:
    """Small functions stay what they are."""
    from megatron.core.jit import jit_fuser

    def function(x):
        return x

    assert jit_fuser(function) is function


def no_compilation_without_a_compiler() -> None:
    """Small functions stay what they are."""
    no_compilation()


def state_before_first_step() -> None:
    """Saving an optimizer that has made no step."""
    model, optimizer = make_optimizer()
    optimizer.sharded_state_dict(model.module.sharded_state_dict(), metadata=metadata())


def loaded_parameter_has_no_step() -> None:
    """Loading a saved optimizer."""
    save_and_load(*make_optimizer())


def own_step_for_each_parameter() -> None:
    """A resumed optimizer counts one step a step."""
    model, optimizer = make_optimizer()
    train(model, optimizer)
    save_and_load(model, optimizer)
    train(model, optimizer)
    steps = {state["step"].item() for state in optimizer.chained_optimizers[0].optimizer.state.values()}
    assert steps == {2.0}


def no_process_for_results() -> None:
    """After a save, no process is left; a forked process hands back results that no pipe holds."""
    save_and_load(*make_optimizer())
    assert not multiprocessing.active_children()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    results = filesystem_async._get_write_results_queue()
    writer = multiprocessing.get_context("fork").Process(target=results.put, args=(b"0" * 2**20,))
    writer.start()
    writer.join()
    assert len(results.get_nowait()) == 2**20


def plain_objects() -> None:
    """An object in a .distcp file that names something to run is refused, and nothing runs."""
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

    planner, index = MCoreLoadPlanner(flatten_state_dict=False), MetadataIndex("key")
    item = ReadItem(LoadItemType.BYTE_IO, index, torch.Size(), index, torch.Size(), torch.Size())
    planner.state_dict = {}
    refuses_objects(lambda file: planner.load_bytes(item, io.BytesIO(file.read_bytes())))
    for value in ([None], [torch.ones(2, dtype=torch.uint8)], io.BytesIO(b"scales")):
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        planner.load_bytes(item, file)
        assert type(planner.state_dict["key"]) is type(value)


def plain_common() -> None:
    """Nor does one in common.pt, whatever the environment says."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    def load(file: Path) -> None:
        file.rename(file.with_name("common.pt"))
        TorchCommonLoadStrategy().load_common(file.parent)

    refuses_objects(load)


def own_states() -> None:
    """What is saved of an optimizer is what it has."""
    model, optimizer = make_optimizer(overlap_grad_reduce=True, bucket_size=1)
    train(model, optimizer)
    inner = optimizer.chained_optimizers[0].optimizer
    expected = [state["exp_avg"].normal_().clone() for state in inner.state.values()]
    assert len(model.buffers[0].buckets) == len(expected) > 2
    save_and_load(model, optimizer)
    for state, before in zip(inner.state.values(), expected, strict=True):
        assert torch.equal(state["exp_avg"], before)


def positions_without_memory() -> None:
    """Built on the meta device, the whole network asks CUDA for nothing: on a machine with a GPU, which is mocked."""
    start()
    from megatron.core.tensor_parallel import layers

    from megatron_patch.conversion.verify import _config
    from megatron_patch.model.llava import LlavaModel
    from tests.unit.config.test_train import LLAVA

    with (
        mock.patch.object(torch.Tensor, "cuda", torch._C.TensorBase.cuda),  # torch's own, which moves tensors
        mock.patch.object(layers.torch.cuda, "current_device", mock.Mock(side_effect=AssertionError)),
        torch.device("meta"),
    ):
        model = LlavaModel(_config(), LLAVA)
    assert all(weight.is_meta for weight in model.parameters())


def streams() -> None:
    """A step of offloaded states waits for copies."""
    train(*make_optimizer(offload=True))


def parameters_on_the_device() -> None:
    """A step of offloaded states."""
    train(*make_optimizer(offload=True))


def parameters_on_the_device_are_pinned() -> None:
    """With a GPU (a mock): the copies are made in pinned memory, once, in fp32, and used again after a load."""
    from types import SimpleNamespace
    from unittest import mock

    from megatron.core.optimizer.cpu_offloading import hybrid_optimizer

    values = torch.randn(3).bfloat16()
    parameter = mock.Mock(dtype=values.dtype, shape=values.shape, is_cuda=True)
    parameter.numel.return_value, parameter.detach.return_value = 3, values
    optimizer = SimpleNamespace(
        param_groups=[{"params": [parameter]}], state={}, param_update_in_fp32=True, pin_cpu_params=True
    )
    sort, empty = hybrid_optimizer.HybridDeviceOptimizer._get_sub_optimizer_param_groups, torch.empty
    with mock.patch.object(torch, "empty", side_effect=lambda *a, pin_memory, **k: empty(*a, **k)) as made:
        _, _, copies, _, in_fp32 = sort(optimizer, 1.0)
        optimizer.param_to_inner_param, optimizer.state = (
            dict(in_fp32),
            {parameter: {"master_param": copies[parameter]}},
        )
        copies[parameter].add_(1)
        assert sort(optimizer, 1.0)[2][parameter] is copies[parameter]
    assert [(call.kwargs["pin_memory"], call.kwargs["dtype"]) for call in made.call_args_list] == [
        (True, torch.float32)
    ]
    assert torch.equal(copies[parameter], values.float() + 1)


def copies_of_own_states() -> None:
    """Building an optimizer with offloaded states makes one copy of each weight that it steps."""
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    copied, stock = [], HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def count(self, fraction):
        found = stock(self, fraction)
        copied.extend(copy.numel() for copy in found[2].values())
        return found

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = count
    model, _ = make_optimizer(offload=True)
    assert sum(copied) == sum(parameter.numel() for parameter in model.parameters())


def states_where_their_weights_are() -> None:
    """Loaded states of one optimizer class on two devices, of which one is a mock: meta."""
    from collections import defaultdict
    from types import SimpleNamespace

    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    parts = [torch.optim.AdamW([torch.zeros(2, device=device)]) for device in ("cpu", "meta")]
    for part in parts:
        for parameter in part.param_groups[0]["params"]:
            part.state[parameter]["exp_avg"] = torch.zeros(2)
    hybrid = SimpleNamespace(sub_optimizers=parts, inner_param_to_orig_param={}, state=defaultdict(dict))
    hybrid.defaults = {"cpu_optimizer_cls": torch.optim.AdamW}
    HybridDeviceOptimizer._move_new_state_to_right_device(hybrid)
    assert [state["exp_avg"].device.type for state in hybrid.state.values()] == ["cpu", "meta"]


def leaves_of_fp32_models() -> None:
    """Building an optimizer with offloaded states."""
    make_optimizer(offload=True)


def loaded_weights_of_fp32_models() -> None:
    """Loading offloaded states: weights too are what was saved."""
    model, optimizer = make_optimizer(offload=True)
    train(model, optimizer)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    save_and_load(model, optimizer)
    (inner,) = optimizer.chained_optimizers
    for parameter, stepped in inner.optimizer.param_to_inner_param.items():
        assert torch.equal(parameter, stepped)
    for parameter, before in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter, before)


def loaded_state_has_no_master() -> None:
    """Loading offloaded states."""
    save_and_load(*make_optimizer(offload=True))


def settings_are_no_state() -> None:
    """Loading offloaded states without running code."""
    save_and_load(*make_optimizer(offload=True))


def few_kernels() -> None:
    """The backward pass of SwiGLU: SiLU, two products, SiLU's own, where nothing is compiled."""
    from megatron.core import jit

    jit.disable_jit_fuser()
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    given = torch.randn(3, 1, 8, requires_grad=True)
    output, gradient = bias_swiglu_impl(given, None), torch.ones(3, 1, 4)
    names = kernels(lambda: torch.autograd.grad(output, given, gradient))
    assert names == ["aten.silu", "aten.mul", "aten.mul", "aten.silu_backward"], names


def one_rotation() -> None:
    """Queries are rotated with three kernels, forward and backward, once their angles were seen."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    query, angles = torch.randn(5, 2, 3, 8, requires_grad=True), torch.randn(5, 1, 1, 8)
    rotated, gradient = _apply_rotary_pos_emb_bshd(query, angles), torch.ones(5, 2, 3, 8)
    forward = kernels(lambda: _apply_rotary_pos_emb_bshd(query, angles))
    backward = kernels(lambda: torch.autograd.grad(rotated, query, gradient))
    assert forward == backward == ["aten.mul", "aten.addcmul_", "aten.addcmul_"], (forward, backward)


def angles_of_packed_samples() -> None:
    """Packed queries too: nothing is put together again for the next layer."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    start()
    query, angles, borders = torch.randn(8, 3, 8), torch.randn(5, 1, 1, 8), torch.tensor([0, 5, 8], dtype=torch.int32)
    group = torch.distributed.group.WORLD
    _apply_rotary_pos_emb_thd(query, borders, angles, cp_group=group)
    names = kernels(lambda: _apply_rotary_pos_emb_thd(query, borders, angles, cp_group=group))
    assert names == ["aten.mul", "aten.addcmul_", "aten.addcmul_"], names


def fused_accumulation() -> None:
    """A linear layer adds its weight's gradient to the one that it has."""
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    start()
    weight = torch.nn.Parameter(torch.randn(3, 4))
    weight.main_grad = torch.ones(3, 4)
    tokens = torch.randn(5, 2, 4)
    output = linear_with_grad_accumulation_and_async_allreduce(tokens, weight, None, True, False, False)
    output.backward(torch.ones_like(output))
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 1 + tokens.sum((0, 1)).expand(3, 4))


def norm_at_once() -> None:
    """The norm of many gradients is waited for once, and is what it was."""
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    start()
    gradients, norms = [torch.randn(size) for size in range(1, 9)], []
    names = kernels(lambda: norms.append(get_grad_norm_fp32(gradients)))
    assert names.count("aten._local_scalar_dense") == 1, names
    assert abs(norms[0] - torch.cat(gradients).norm().item()) < 1e-6 * norms[0]


def scaling_in_place() -> None:
    """Clipped gradients are multiplied where they are."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.full((2,), 3.0)
    names = kernels(lambda: clip_grad_by_total_norm_fp32(parameters, max_norm=1.0, total_norm=2.0))
    assert [name for name in names if name != "aten.zeros"] == ["aten._foreach_mul_"], names
    assert all(parameter.grad.allclose(torch.tensor(1.5)) for parameter in parameters)


def version_of_nothing() -> None:
    """Settings for offloaded 16-bit weights."""
    from megatron.core.optimizer import OptimizerConfig

    OptimizerConfig(
        lr=0.1, use_distributed_optimizer=True, use_precision_aware_optimizer=True, optimizer_cpu_offload=True
    )
