"""How many processes, where, told by the environment; and what is said of their end."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from megatron_patch import forking
from megatron_patch.config.train import MOCK, Parallel
from megatron_patch.files.names import STORE, TRAINING
from megatron_patch.training.launch import (
    _meeting_place,
    _signals,
    _torchrun,
    check_devices,
    check_files,
    find_nodes,
    forget_other_launchers,
    is_worker,
    launch,
    meet_in_files,
    processes_per_node,
    suggest_faster,
)
from tests.tiny_runs import config
from tests.unit.config.test_train import LLAVA

JOB = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "node-0", "MASTER_PORT": "6000"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (*JOB, "NPROC_PER_NODE", "KUBERNETES_CONTAINER_RESOURCE_GPU"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def run(env="dsw", **sizes):
    return config(Path("weights"), Path("out"), parallel=Parallel(env=env, **sizes))


def test_a_temporary_folder_without_locks_is_named(tmp_path, environment, capsys):
    # A mock of a file system without them.
    environment.setattr("megatron_patch.training.launch.lock", lambda descriptor: False)
    folder = tmp_path / "new"
    folder.mkdir()
    assert _meeting_place(str(folder)) == ["--standalone"]
    assert f"warning: {tmp_path}: no file locks there" in capsys.readouterr().err


def test_dsw_is_this_machine_whatever_the_environment_says(environment):
    environment.setenv("WORLD_SIZE", "4")
    environment.setenv("RANK", "3")
    assert find_nodes(run()) == (1, 0)


def test_dlc_reads_a_pytorch_job(environment):
    for name, value in JOB.items():
        environment.setenv(name, value)
    assert find_nodes(run("dlc")) == (4, 3)
    environment.delenv("MASTER_ADDR")
    with pytest.raises(ValueError, match="--env dlc: MASTER_ADDR not in the environment"):
        find_nodes(run("dlc"))


def test_processes_per_node(environment):
    assert processes_per_node(run(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), nodes=1) == 4
    environment.setenv("KUBERNETES_CONTAINER_RESOURCE_GPU", "0")  # a pod without
    assert processes_per_node(run(tensor_model_parallel_size=2), nodes=1) == 2
    environment.setenv("KUBERNETES_CONTAINER_RESOURCE_GPU", "8")
    assert processes_per_node(run(), nodes=1) == 8
    environment.setenv("NPROC_PER_NODE", "2")
    assert processes_per_node(run(), nodes=1) == 2
    environment.setenv("NPROC_PER_NODE", "two")
    with pytest.raises(ValueError, match="NPROC_PER_NODE='two': expected a whole number of 1 or more"):
        processes_per_node(run(), nodes=1)


def test_missing_folder_is_named(tmp_path):
    settings = run()
    there = replace(settings, model=replace(settings.model, pretrained_checkpoint=tmp_path))
    with pytest.raises(FileNotFoundError, match="--pretrained-checkpoint weights: no such folder"):
        check_files(settings)
    with pytest.raises(FileNotFoundError, match="--data-path out: no such folder"):
        check_files(there)


def test_more_processes_than_gpus_are_refused(environment):
    environment.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(run(), 2)
    with pytest.raises(ValueError, match="3 processes: each takes a GPU, and torch sees 2 here; set NPROC_PER_NODE"):
        check_devices(run(), 3)
    environment.setattr(torch.cuda, "device_count", lambda: 0)
    check_devices(run(), 3)


H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=79 * 2**30)
"""A mock of a GPU."""
ONE_QUEUE, GROWING = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("gpus", "sizes", "given", "expected"),
    [
        (0, {"tensor_model_parallel_size": 2}, {}, {}),
        (2, {}, {}, GROWING),
        (2, {"pipeline_model_parallel_size": 2}, {}, GROWING),
        (2, {"tensor_model_parallel_size": 2}, {}, ONE_QUEUE | GROWING),
        (2, {"context_parallel_size": 2}, {}, ONE_QUEUE | GROWING),
        (2, {"tensor_model_parallel_size": 2}, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, GROWING),
        (2, {}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, {}),
        (2, {}, {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, {}),
    ],
)
def test_what_gpus_want_is_in_the_ranks_environment(environment, mcore, tmp_path, gpus, sizes, given, expected):
    """The GPUs are a mock. What the user set is left as it is."""
    names = {*ONE_QUEUE, *GROWING, "PYTORCH_ALLOC_CONF"}
    handed = {}
    environment.setattr(torch.cuda, "device_count", lambda: gpus)
    environment.setattr(torch.cuda, "get_device_properties", lambda index: H100)
    environment.setattr(torchrun, "main", lambda arguments: handed.update(os.environ))
    environment.setattr("logging.disable", lambda level: None)
    with mock.patch.dict(os.environ):
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(given, NPROC_PER_NODE="2")
        settings = config(mcore, tmp_path, parallel=Parallel(**sizes), data_path=MOCK)
        assert launch(settings, Path("script.py"), []) == 0
    assert {name: handed[name] for name in names & handed.keys()} == expected | given


def test_faster_settings_are_suggested_on_gpus_alone(environment, capsys):
    given = run(tensor_model_parallel_size=4)
    settings = replace(
        given,
        model=replace(given.model, precision="bf16", freeze_lm=True, freeze_vit=True, decoder_seq_length=1024),
        data=replace(given.data, micro_batch_size=1, global_batch_size=256),
    )
    environment.setattr(torch.cuda, "device_count", lambda: 0)
    suggest_faster(settings, LLAVA, 4)
    assert not capsys.readouterr().out

    # Mocks of a GPU.
    environment.setattr(torch.cuda, "device_count", lambda: 4)
    environment.setattr(torch.cuda, "get_device_properties", lambda index: H100)
    suggest_faster(settings, LLAVA, 4)
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("TP 1, PP 1, CP 1, micro batch 8, AC none fits (")
    assert "of this GPU's 79 GiB" in said
    small = SimpleNamespace(name="NVIDIA H100", total_memory=3 * 2**30)
    environment.setattr(torch.cuda, "get_device_properties", lambda index: small)
    suggest_faster(settings, LLAVA, 4)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("left", "code", "said"),
    [
        ({}, 143, ""),
        (
            {"0/training": "", "1/training": "", "1/error.json": "RuntimeError: out/iter_0000004: cannot be saved"},
            1,
            "error: rank 5: out/iter_0000004: cannot be saved\n",
        ),
        ({"1/training": ""}, 1, "error: rank 5 ended before the run was saved, for which PET_SHUTDOWN_TIMEOUT gives"),
    ],
)
def test_a_signalled_run_that_was_not_saved_says_so(environment, capsys, left, code, said):
    """On the second node of two, with four ranks each."""

    def main(arguments):
        folder = Path(arguments[0].removeprefix("--log-dir="), "run", "attempt_0")
        for name, text in left.items():
            message = {"message": text, "extraInfo": {"timestamp": "1"}}
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps({"message": message}))
        raise SignalException("stopped", signal.SIGTERM)

    assert TRAINING == "training"
    environment.setattr(torchrun, "main", main)
    environment.setattr("logging.disable", lambda level: None)
    environment.setenv("PET_SHUTDOWN_TIMEOUT", "600")
    assert _torchrun([], Path("log"), first_rank=4) == code
    assert capsys.readouterr().err[: len(said) or None] == said


@pytest.mark.parametrize(
    "left",
    [
        {"PET_NNODES": "2", "PET_RDZV_BACKEND": "etcd", "PET_NODE_RANK": "1", "PET_MAX_RESTARTS": "3"},
        {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_ERROR_FILE": "/nowhere/error.json", "RANK": "1", "LOCAL_RANK": "1"},
        {
            "PET_STANDALONE": "1",
            "PET_NPROC_PER_NODE": "gpu",
            "PET_RUN_PATH": "1",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        },
        {
            "MASTER_ADDR": "elsewhere",
            "MASTER_PORT": "1",
            "WORLD_SIZE": "8",
            "SLURM_NTASKS": "8",
            "OMPI_COMM_WORLD_RANK": "3",
        },
    ],
)
def test_another_launchers_variables_are_not_obeyed(environment, tmp_path, left):
    """What torchrun makes of its arguments, and of the environment that the launcher leaves it."""
    settings = {}

    def main(arguments):
        assert is_worker()  # as its ranks will be, who inherit this
        settings["config"] = torchrun.config_from_args(torchrun.parse_args(arguments))[0]
        settings["left"] = sorted(name for name in os.environ if name.startswith(("PET_", "TORCHELASTIC_")))

    environment.setattr(torchrun, "main", main)
    environment.setattr("logging.disable", lambda level: None)
    with mock.patch.dict(os.environ, left):
        assert not is_worker()
        assert _torchrun(["--nproc-per-node=3", "script.py"], tmp_path, first_rank=0, is_alone=True) == 0
        assert not is_worker()
    config = settings["config"]
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (1, 1, 3, 0)
    assert (config.rdzv_backend, config.rdzv_configs["store_type"]) == ("c10d", "file")
    assert settings["left"] == ["PET_SHUTDOWN_TIMEOUT"]


def test_a_run_on_one_machine_meets_in_files(environment, mcore, tmp_path):
    handed = []
    environment.setattr(torchrun, "main", lambda arguments: handed.extend([*arguments, os.environ[STORE]]))
    environment.setattr("logging.disable", lambda level: None)
    environment.setattr(torch.cuda, "device_count", lambda: 0)
    with mock.patch.dict(os.environ):
        assert launch(config(mcore, tmp_path, data_path=MOCK), Path("script.py"), []) == 0
    assert "--rdzv-conf=store_type=file" in handed
    assert f"--signals-to-handle={_signals()}" in handed
    assert handed[-1].startswith("file://")


def test_a_python_that_needs_the_repair_is_named(environment, mcore, tmp_path, capsys):
    environment.setattr(torchrun, "main", lambda arguments: None)
    environment.setattr("logging.disable", lambda level: None)
    for is_needed in (True, False):
        environment.setattr(forking, "needed", lambda is_needed=is_needed: is_needed)
        with mock.patch.dict(os.environ):
            assert launch(config(mcore, tmp_path, data_path=MOCK), Path("script.py"), []) == 0
        assert ("a forked process may hang before its first line" in capsys.readouterr().out) == is_needed


def test_how_long_a_save_may_take_is_a_number(environment):
    environment.setenv("PET_SHUTDOWN_TIMEOUT", "long")
    with pytest.raises(ValueError, match="PET_SHUTDOWN_TIMEOUT='long': expected a whole number of 1 or more"):
        forget_other_launchers()


def test_on_one_machine_nothing_listens(tmp_path):
    """Rendezvous, and the ranks' own group, as torchrun and `groups.start` make them."""

    def listening() -> set[str]:
        lines = [
            line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()
        ]
        inodes = {parts[9] for parts in lines if parts[3] == "0A"}
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return {link for link in links if link.removeprefix("socket:[").rstrip("]") in inodes}

    before = listening()
    with mock.patch.dict(os.environ):
        arguments = [*meet_in_files(str(tmp_path)), "--nproc-per-node=1", "script.py"]
        config = torchrun.config_from_args(torchrun.parse_args(arguments))[0]
        handler = get_rendezvous_handler(
            RendezvousParameters(
                config.rdzv_backend,
                config.rdzv_endpoint,
                config.run_id,
                config.min_nodes,
                config.max_nodes,
                config.local_addr,
                **config.rdzv_configs,
            )
        )
        try:
            assert handler.next_rendezvous().world_size == 1
            assert listening() == before
            assert Path(tmp_path, "rendezvous").exists()
            assert os.environ[STORE] == f"file://{tmp_path}/ranks"
        finally:
            handler.shutdown()
