"""What megatron.core 0.16.1 unpickles when it loads a checkpoint, without a look at who wrote it, on every machine.

Neither repair names the function that it replaces: left out for another version's, it would be missed in silence.
"""

from __future__ import annotations

import io
from types import ModuleType
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.serialization import safe_globals

from megatron_patch.patches import Repair
from megatron_patch.tensor_io.pickles import load_plain


def plain_objects(module: ModuleType) -> None:
    """An entry of a `.distcp` file that is no tensor holds plain values and tensors, or is refused.

    torch's DefaultLoadPlanner.load_bytes (torch/distributed/checkpoint/default_planner.py:382), which
    strategies/torch.py:500 inherits, unpickles with weights_only=False: a pickle runs what it names.
    Needed until torch's planner can be told to load plain values only.
    """

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        with safe_globals([io.BytesIO]):  # what Transformer Engine before 2.0 has as an extra state
            loaded = load_plain(value)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], loaded)
        else:
            self.state_dict[key] = loaded

    module.MCoreLoadPlanner.load_bytes = load_bytes


def plain_common(module: ModuleType) -> None:
    """`common.pt`, and objects in files of their own, hold plain values and tensors, or are refused.

    strategies/common.py:87 to :133 leave `weights_only` to torch, whose default an environment variable
    (TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, which some programs ask for) turns off. Where multistorageclient is installed,
    as energon has it, they load through that: these are plain files, which torch reads.
    Needed until they say weights_only=True.
    """
    module.torch = _Torch()
    module.MultiStorageClientFeature = _Disabled


class _Torch:
    """torch with a `load` that takes plain values only."""

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return load_plain(file, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _Disabled:
    @staticmethod
    def is_enabled() -> bool:
        return False


STRATEGIES = "megatron.core.dist_checkpointing.strategies"
REPAIRS = (Repair(f"{STRATEGIES}.torch", plain_objects), Repair(f"{STRATEGIES}.common", plain_common))
