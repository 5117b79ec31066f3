"""What the loaders use of torch, energon and Python that these do not promise, behind names of our own.

Read in torch 2.13.0 (torch/utils/data/dataloader.py, torch/_utils.py), energon 7.4.1 (typed_converter.py,
module_loader.py, flavors/webdataset/metadata.py) and CPython 3.11 (multiprocessing/process.py, queues.py). A test for
each says when one of them is gone or has another meaning.
"""

from __future__ import annotations

import contextlib
import multiprocessing.process
import multiprocessing.queues
import types
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from megatron.energon import SavableDataLoader
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset import metadata
from megatron.energon.module_loader import ModuleLoader
from megatron.energon.typed_converter import JsonParser
from torch._utils import ExceptionWrapper

T = TypeVar("T")


class StartedLoader(SavableDataLoader[T]):
    """A loader whose workers can be started before the first batch is asked for, seen, and ended at once."""

    _started: Any = None
    """torch's iterator, until the first batch is asked for."""

    def start_workers(self) -> None:
        """They begin to read. Does nothing where they did, or where there are none. Raises OSError."""
        if self.num_workers and not self.has_started:
            self._started = super()._get_iterator()

    def end_workers(self) -> None:
        """After `start_workers`. Left to the garbage collector, which first ends queues' threads, each takes 5 s."""
        self._readers._shutdown_workers()

    @property
    def has_started(self) -> bool:
        """Whether the workers began."""
        return self._readers is not None

    @property
    def workers(self) -> list[BaseProcess]:
        """The processes that read; none before they began."""
        return getattr(self._readers, "_workers", [])

    @property
    def next_worker(self) -> int:
        """Number of the worker whose batch is next."""
        number, *_ = self._readers._task_info.get(self._readers._rcvd_idx, (0,))
        return number

    def _get_iterator(self) -> Any:
        started, self._started = self._started, None
        return super()._get_iterator() if started is None else started

    @property
    def _readers(self) -> Any:
        return self._iterator if self._started is None else self._started


def on_lost_batch(explain: Callable[[Exception], Exception]) -> None:
    """In a worker: what keeps it from handing a batch over is raised where that is waited for, as `explain` gives it.

    Python only prints it. The hook is the class's, for the queues are torch's and energon's.
    """

    def hand_over(results: Any, error: Exception, item: Any) -> None:
        if isinstance(item, tuple):  # torch's: a number and a batch
            reason = explain(error)
            results.put((item[0], ExceptionWrapper((type(reason), reason, None), "in a process that reads")))

    multiprocessing.queues.Queue._on_queue_feeder_error = hand_over


def children() -> dict[int, str]:
    """Processes that multiprocessing started here: pid -> name. What Python promises would reap those that ended."""
    module: Any = multiprocessing.process
    return {process.pid: process.name for process in list(module._children) if process.pid}


@contextlib.contextmanager
def replaced_in_energon(
    resolve: Callable[..., Any],
    load_module: Callable[..., None],
    opened: Callable[..., Any],
    expand: Callable[..., Iterator[str]],
) -> Iterator[None]:
    """Within this context energon calls these, and knows no module that it loaded before.

    For an object that a yaml file names, for a Python file of a dataset's, to open a file, and for a pattern of names.
    """
    names = [
        (JsonParser, "_resolve_object", resolve),
        (ModuleLoader, "_load_module", load_module),
        (ModuleLoader, "_modules", {}),
        (EPath, "open", opened),
        (metadata, "braceexpand", types.SimpleNamespace(braceexpand=expand)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in names]
    try:
        for owner, name, value in names:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
