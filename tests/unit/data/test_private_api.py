"""What torch, energon and Python do not promise is still there, and still means what is made of it.

Asked of them directly: where they change, this says which name, and not that training stands still.
"""

from __future__ import annotations

import multiprocessing.queues
import os
import time

import braceexpand
import pytest
import torch
from megatron.energon import SavableDataLoader
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset import metadata
from megatron.energon.module_loader import ModuleLoader
from megatron.energon.typed_converter import JsonParser
from torch.utils.data import DataLoader

from megatron_patch.data.private_api import StartedLoader, children, on_lost_batch, replaced_in_energon


class Started(StartedLoader, DataLoader):
    """Without energon, whose loader adds nothing to these."""

    __init__ = DataLoader.__init__
    __iter__ = DataLoader.__iter__


@pytest.fixture
def loader():
    loader = Started(range(8), num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    yield loader
    if loader.has_started:
        loader.end_workers()


def test_workers_are_started_once_and_before_the_first_batch(loader):
    assert not loader.has_started
    assert loader.workers == []
    loader.start_workers()
    workers = loader.workers
    assert [worker.is_alive() for worker in workers] == [True, True]
    batches = iter(loader)
    loader.start_workers()
    assert loader.workers == workers
    assert torch.cat(list(batches)).tolist() == list(range(8))


def test_the_worker_whose_batch_is_next_is_known(loader):
    loader.start_workers()
    assert loader.next_worker == 0
    batches = iter(loader)
    for number in (1, 0, 1):
        next(batches)
        assert loader.next_worker == number


def test_workers_are_ended(loader):
    loader.start_workers()
    start = time.monotonic()
    loader.end_workers()
    assert not any(worker.is_alive() for worker in loader.workers)
    assert time.monotonic() - start < 5


def test_children_are_known_and_not_reaped():
    child = torch.multiprocessing.get_context("fork").Process(target=lambda: None, name="reader")
    child.start()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert children()[child.pid] == "reader"
    assert os.waitpid(child.pid, os.WNOHANG) == (child.pid, 0)
    child.join()


def test_energons_loader_is_torchs():
    """`StartedLoader` stands between them."""
    assert issubclass(SavableDataLoader, DataLoader)
    assert "_get_iterator" not in vars(SavableDataLoader)


def test_what_keeps_a_batch_from_being_handed_over_is_raised_where_it_is_waited_for(monkeypatch):
    monkeypatch.setattr(multiprocessing.queues.Queue, "_on_queue_feeder_error", None)  # put back afterwards
    on_lost_batch(lambda error: KeyError(f"lost ({type(error).__name__})"))
    queue = torch.multiprocessing.get_context("fork").Queue()
    queue.put((3, lambda: "cannot be pickled"))
    number, wrapped = queue.get(timeout=10)
    assert number == 3
    with pytest.raises(KeyError, match=r"lost \((AttributeError|PicklingError)\)"):
        wrapped.reraise()


class Named:
    """What a yaml file names."""

    def __init__(self) -> None:
        pass


@pytest.fixture
def calls():
    """What energon asked for, in the context of it."""
    calls = []

    def note(*arguments):
        calls.append(arguments[1])
        return Named

    plain = EPath.open

    def opened(path, *arguments, **options):
        calls.append(str(path))
        return plain(path, *arguments, **options)

    def expand(pattern):
        calls.append(pattern)
        return iter(["00000.tar"])

    with replaced_in_energon(resolve=note, load_module=note, opened=opened, expand=expand):
        yield calls


def test_energon_asks_for_what_a_yaml_file_names(calls):
    JsonParser().raw_to_instance({"__module__": "os", "__class__": "_Environ"}, Named)
    assert calls == ["os"]


def test_energon_asks_for_python_files_that_were_loaded_before_too(calls, monkeypatch):
    monkeypatch.setattr(ModuleLoader, "_modules", {})
    with pytest.raises(KeyError):
        ModuleLoader()["a.py"]
    assert [str(path) for path in calls] == [str(EPath("a.py"))]


def test_energon_asks_for_files_and_for_patterns_of_names(calls, tmp_path):
    folder = tmp_path / ".nv-meta"
    folder.mkdir()
    (folder / ".info.json").write_text('{"energon_version": "7.4.1", "shard_counts": {"00000.tar": 3}}')
    (folder / "split.yaml").write_text("split_parts: {train: ['{0..2}.tar']}\nexclude: []\n")
    meta = metadata.WebdatasetMeta.from_config(EPath(tmp_path), split_part="train")
    assert [shard.name for shard in meta.shards] == ["00000.tar"]
    assert "{0..2}.tar" in calls
    assert str(EPath(folder / "split.yaml")) in calls


def test_energon_is_as_before_afterwards():
    before = JsonParser._resolve_object, ModuleLoader._load_module, ModuleLoader._modules, EPath.open
    with pytest.raises(ZeroDivisionError), replaced_in_energon(print, print, print, iter):
        raise ZeroDivisionError
    assert (JsonParser._resolve_object, ModuleLoader._load_module, ModuleLoader._modules, EPath.open) == before
    assert metadata.braceexpand is braceexpand
