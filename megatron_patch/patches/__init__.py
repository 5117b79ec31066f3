"""Repairs of megatron.core 0.16.1, made while it is imported, so that no other file knows about them.

`no_cuda` holds what it needs where there is no CUDA device, `no_compiler` where there is one and no C compiler,
`no_transformer_engine` where Transformer Engine and Apex are missing; `transformer_engine` hides one that cannot be
imported. `rotary`, `swiglu` and `gradients` hold what is faster otherwise, `meta_device`, `saving`, `loading` and
`optimizer_offload` what is to be mended everywhere. Each repair names the modules that it mends and is made right after
such a module was loaded. One that replaces a function is for that function as 0.16.1 has it: where another version's is
not the same, it is left out, and a warning says so.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.abc
import importlib.machinery
import inspect
import logging
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from megatron_patch.patches.transformer_engine import transformer_engine_fault

logger = logging.getLogger(__name__)

PACKAGE = "megatron.core"


@dataclass(frozen=True)
class Repair:
    """One mended fault; the docstring of `make` says what, which lines, why, and when it is no longer needed."""

    modules: str
    """Name of a module, or a pattern of names with `*`."""

    make: Callable[[ModuleType], None]

    function: str | None = None
    """What in the module is replaced, if it is one function."""

    source: str = ""
    """Beginning of the sha256 of that function's source."""

    def fits(self, module: ModuleType) -> bool:
        """Whether the function that has the fault is the module's, to the letter."""
        if self.function is None:
            return True
        try:
            found = inspect.getsource(operator.attrgetter(self.function)(module))  # of what other repairs wrapped, too
        except AttributeError:
            return False
        return hashlib.sha256(found.encode()).hexdigest().startswith(self.source)


def install() -> None:
    """Have megatron.core repaired when it is first imported. Imports nothing itself; a second call does nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if PACKAGE in sys.modules:
        raise ImportError(
            f"{PACKAGE} was imported before megatron_patch, which repairs it on import: import megatron_patch first"
        )
    sys.meta_path.insert(0, _Finder())


def needed() -> list[Repair]:
    """The repairs for this machine."""
    import torch

    from megatron_patch.patches import (
        gradients,
        loading,
        meta_device,
        no_compiler,
        no_cuda,
        no_transformer_engine,
        optimizer_offload,
        rotary,
        saving,
        swiglu,
    )

    repairs = [
        *rotary.REPAIRS,
        *swiglu.REPAIRS,
        *gradients.REPAIRS,
        *saving.REPAIRS,
        *loading.REPAIRS,
        *meta_device.REPAIRS,
        *no_transformer_engine.REPAIRS,
        *optimizer_offload.REPAIRS,
    ]
    if not torch.cuda.is_available():
        repairs += no_cuda.REPAIRS
    elif not no_compiler.can_compile():
        repairs += no_compiler.REPAIRS
    return repairs


class _Finder(importlib.abc.MetaPathFinder):
    """Finds megatron.core's modules as usual and wraps the loaders of those that have repairs."""

    def __init__(self) -> None:
        self.repairs: list[Repair] = []

    def find_spec(self, name: str, path, target=None) -> importlib.machinery.ModuleSpec | None:
        """A module of megatron.core's, to be repaired when it is loaded; None: others find it."""
        if name == PACKAGE:
            transformer_engine_fault()
            self.repairs = needed()
        elif not name.startswith(PACKAGE + "."):
            return None
        repairs = [repair for repair in self.repairs if fnmatch.fnmatchcase(name, repair.modules)]
        spec = importlib.machinery.PathFinder.find_spec(name, path) if repairs else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, repairs)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, repairs: list[Repair]) -> None:
        self.loader = loader
        self.repairs = repairs

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Load the module, then make its repairs."""
        self.loader.exec_module(module)
        for repair in self.repairs:
            if repair.fits(module):
                repair.make(module)
            else:
                logger.warning(
                    f"{module.__name__}.{repair.function} is not what {repair.make.__module__}.{repair.make.__name__} "
                    f"was written for, which is left out: see there what goes wrong if it is still needed"
                )

    def __getattr__(self, name: str):
        # importlib.resources, inspect and the like ask the loader for sources and paths.
        return getattr(self.loader, name)
