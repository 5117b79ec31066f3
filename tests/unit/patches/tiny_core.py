"""A small model of megatron.core by itself, and what torch is asked to compute."""

from __future__ import annotations

import copy
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.canary import Canary


def kernels(function: Callable[[], object]) -> list[str]:
    """The operations on numbers that `function` dispatches; no views, no empty tensors."""
    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if not operation.is_view and "empty" not in str(operation):
                names.append(str(operation.overloadpacket))
            return operation(*args, **(kwargs or {}))

    with Recorder():
        function()
    return names


def start() -> None:
    from megatron_patch.config.train import Parallel
    from megatron_patch.model import groups

    store = f"file://{tempfile.mkdtemp()}/store"
    groups.start(Parallel(), seed=1, init_method=store, rank=0, world_size=1)


def wrapped_model(**ddp):
    """A small language model wrapped for data parallelism."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    start()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, calculate_per_token_loss=True)
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=16, max_sequence_length=8)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, **ddp)
    return DistributedDataParallel(config, ddp_config, model)


def make_optimizer(offload: bool = False, **ddp):
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = wrapped_model(**ddp)
    return model, get_megatron_optimizer(
        OptimizerConfig(
            lr=0.1,
            use_distributed_optimizer=True,
            optimizer_cpu_offload=offload,
            optimizer_offload_fraction=float(offload),
        ),
        [model],
    )


def train(model, optimizer) -> None:
    for parameter in model.parameters():
        parameter.main_grad.fill_(1.0)
    optimizer.step()


def save_and_load(model, optimizer) -> None:
    from megatron.core import dist_checkpointing

    with tempfile.TemporaryDirectory() as folder:
        state = optimizer.sharded_state_dict(model.module.sharded_state_dict(), metadata=metadata())
        dist_checkpointing.save({"optimizer": copy.copy(state)}, folder)
        target = optimizer.sharded_state_dict(model.module.sharded_state_dict(), is_loading=True, metadata=metadata())
        optimizer.load_state_dict(dist_checkpointing.load({"optimizer": target}, folder)["optimizer"])


def metadata() -> dict:
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def refuses_objects(load: Callable[[Path], object]) -> None:
    """`load` raises for a file of torch.save that would make another file, which is not made."""
    with tempfile.TemporaryDirectory() as folder:
        file, canary = Path(folder) / "saved", Path(folder) / "canary"
        torch.save([Canary(canary)], file)
        try:
            load(file)
        except pickle.UnpicklingError:
            assert not canary.exists()
        else:
            raise AssertionError("loaded")
        with zipfile.ZipFile(Path(folder) / "compressed", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps("a" * 1000, 2))
            archive.writestr("archive/version", "3")
        with pytest.raises(ValueError, match="is compressed"):
            load(Path(folder) / "compressed")
