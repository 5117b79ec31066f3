"""What megatron.core 0.16.1 needs where there is no CUDA device. Line numbers are the wheel's, under megatron/core/.

Nothing here changes what would have worked: without a device every replaced call raises. All of it becomes needless
when megatron.core asks for "the current accelerator" instead of CUDA.
"""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType

import torch

from megatron_patch.patches import Repair

CPU = torch.device("cpu")
FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn")
FACTORIES += ("empty_like", "zeros_like", "ones_like", "full_like")


def current_device(torch_module: ModuleType) -> None:
    """`torch.cuda.current_device()` answers the CPU.

    Some 60 allocations ask for it: tensor_parallel/layers.py:552, mappings.py:91, rotary_pos_embedding.py:78,
    p2p_communication.py:190, param_and_grad_buffer.py:783.
    """
    torch_module.cuda.current_device = lambda: CPU


def synchronisation(torch_module: ModuleType) -> None:
    """Waiting for a device, choosing one and emptying its cache do nothing: the CPU computes in order.

    p2p_communication.py:242, filesystem_async.py:230, timers.py:152.
    """
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats", "ipc_collect"):
        setattr(torch_module.cuda, name, _nothing())
    torch_module.cuda.nvtx.range_push = _nothing()
    torch_module.cuda.nvtx.range_pop = _nothing()


def random_numbers(torch_module: ModuleType) -> None:
    """The device's random numbers are the CPU's. tensor_parallel/random.py:235-240, 422."""
    cuda = torch_module.cuda
    # Not torch.manual_seed: that one calls torch.cuda.manual_seed_all.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def random_number_tracker(random: ModuleType) -> None:
    """The tracker's states are the CPU's, and drawing inside a fork is no fault. tensor_parallel/random.py:41, 72, 243.

    Its own `fork` warns when the CPU's state has changed inside, which here is what it is for.
    """
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    stock_fork = random.CudaRNGStatesTracker.fork

    @contextlib.contextmanager
    @functools.wraps(stock_fork)
    def fork(self, name=random._MODEL_PARALLEL_RNG_TRACKER_NAME):
        logger = random.logging.getLogger(random.__name__)
        logger.addFilter(_is_not_about_cpu_state)
        try:
            with stock_fork(self, name):
                yield
        finally:
            logger.removeFilter(_is_not_about_cpu_state)

    random.CudaRNGStatesTracker.fork = fork


def factories(torch_module: ModuleType) -> None:
    """A literal `device="cuda"` means the CPU, and memory is not pinned.

    schedules.py:596, optimizer/optimizer.py:473, clip_grads.py:90-207, transformer/utils.py:35, rope_utils.py.
    """
    for name in FACTORIES:
        setattr(torch_module, name, _on_cpu(getattr(torch_module, name)))


def moves(torch_module: ModuleType) -> None:
    """`.cuda()`, `.to("cuda")` and `.pin_memory()` leave a tensor where it is.

    clip_vit_model.py:124, rope_utils.py:64, exchange_utils.py:336.
    """
    tensor = torch_module.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self
    torch_module.nn.Module.cuda = lambda self, *args, **kwargs: self
    stock_to = tensor.to

    @functools.wraps(stock_to)
    def to(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return stock_to(self, *args, **kwargs)

    tensor.to = to


def type_names(torch_module: ModuleType) -> None:
    """`tensor.type()` answers "torch.cuda.FloatTensor": parameters are sorted by that text.

    optimizer.py:671, distrib_optimizer.py:361, 420, 582, clip_grads.py:167.
    """
    stock_type = torch_module.Tensor.type

    @functools.wraps(stock_type)
    def type_name(self, *args, **kwargs):
        result = stock_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch_module.Tensor.type = type_name


def no_compilation(jit: ModuleType) -> None:
    """Small functions are not compiled: it costs 25 s in the first step and a C++ compiler. jit.py:26."""
    jit.disable_jit_fuser()


REPAIRS = (
    Repair("torch", current_device),
    Repair("torch", synchronisation),
    Repair("torch", random_numbers),
    Repair("torch", factories),
    Repair("torch", moves),
    Repair("torch", type_names),
    Repair("megatron.core.jit", no_compilation),
    Repair("megatron.core.tensor_parallel.random", random_number_tracker),
)


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or getattr(device, "type", None) == "cuda"


def _nothing():
    # A function of its own for each name: torch._dynamo refuses an object that it meets twice.
    return lambda *args, **kwargs: None


def _on_cpu(factory):
    @functools.wraps(factory)
    def make(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _is_not_about_cpu_state(record) -> bool:
    return "CPU RNG state changed" not in record.getMessage()
