"""What megatron.core 0.16.1 needs where there is no CUDA device. Line numbers are the wheel's, under megatron/core/.

megatron.core's modules see torch through a view in which the CPU is the device; torch itself stays as it is for
everybody else. Only tensors' methods cannot be seen otherwise by some: those are mended in torch, where without a
device they only raise. All of it becomes needless when megatron.core asks for "the accelerator" instead of CUDA.
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


class _View(ModuleType):
    """A module as it is, but for what was set here."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module.__name__)
        self._module = module

    def __getattr__(self, name: str):
        return getattr(self._module, name)


VIEW = _View(torch)
VIEW.cuda = _View(torch.cuda)


def torch_without_cuda(module: ModuleType) -> None:
    """The module sees the view instead of torch."""
    if module.__dict__.get("torch") is torch:
        module.torch = VIEW


def current_device(package: ModuleType) -> None:
    """`torch.cuda.current_device()` answers the CPU.

    Some 60 allocations ask for it: tensor_parallel/layers.py:552, mappings.py:91, rotary_pos_embedding.py:78,
    p2p_communication.py:190, param_and_grad_buffer.py:783.
    """
    VIEW.cuda.current_device = lambda: CPU


def synchronisation(package: ModuleType) -> None:
    """Waiting for the device does nothing: the CPU computes in order. p2p_communication.py:242, timers.py:152."""
    VIEW.cuda.synchronize = lambda device=None: None


def streams(package: ModuleType) -> None:
    """There is one stream, on which everything is done already. cpu_offloading/hybrid_optimizer.py:102, 218."""
    VIEW.cuda.current_stream = lambda device=None: _DONE
    VIEW.cuda.stream = lambda stream: contextlib.nullcontext()


def random_numbers(package: ModuleType) -> None:
    """The device's random numbers are the CPU's. tensor_parallel/random.py:235-240, 422."""
    # Not torch.manual_seed: that one seeds the devices too.
    VIEW.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    VIEW.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    VIEW.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def factories(package: ModuleType) -> None:
    """A literal `device="cuda"` means the CPU, and memory is not pinned.

    schedules.py:596, optimizer/optimizer.py:473, clip_grads.py:90-207, transformer/utils.py:35, rope_utils.py.
    """
    for name in FACTORIES:
        setattr(VIEW, name, _on_cpu(getattr(torch, name)))


def moves(package: ModuleType) -> None:
    """`.cuda()` and `.to("cuda")` leave a tensor where it is. clip_vit_model.py:124, exchange_utils.py:336."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    stock_to = torch.Tensor.to

    @functools.wraps(stock_to)
    def to(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return stock_to(self, *args, **kwargs)

    torch.Tensor.to = to


def type_names(package: ModuleType) -> None:
    """`tensor.type()` answers "torch.cuda.FloatTensor": parameters are sorted by that text.

    optimizer.py:671, distrib_optimizer.py:361, 420, 582, clip_grads.py:167.
    """
    stock_type = torch.Tensor.type

    @functools.wraps(stock_type)
    def type_name(self, *args, **kwargs):
        result = stock_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = type_name


def no_compilation(jit: ModuleType) -> None:
    """Small functions are not compiled: it costs 25 s in the first step and a C++ compiler. jit.py:26."""
    jit.disable_jit_fuser()


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


REPAIRS = (
    Repair("megatron.core*", torch_without_cuda),
    Repair("megatron.core", current_device),
    Repair("megatron.core", synchronisation),
    Repair("megatron.core", streams),
    Repair("megatron.core", random_numbers),
    Repair("megatron.core", factories),
    Repair("megatron.core", moves),
    Repair("megatron.core", type_names),
    Repair("megatron.core.jit", no_compilation),
    Repair("megatron.core.tensor_parallel.random", random_number_tracker, "CudaRNGStatesTracker.fork", "6821e1e39725"),
)


class _Done:
    """A stream and its events: nothing to wait for."""

    def wait_stream(self, stream: object) -> None: ...

    def record_event(self) -> _Done:
        return self

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...


_DONE = _Done()


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or getattr(device, "type", None) == "cuda"


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
