"""From one command to its processes: check everything that can be checked, then hand over to torchrun.

What can be known from the arguments and from config.json is answered before torch is imported.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_patch import forking
from megatron_patch.config.train import MOCK, Config
from megatron_patch.conversion.companions import checkpoint_folder
from megatron_patch.estimate.cards import find_card
from megatron_patch.estimate.report import line, report, suggest
from megatron_patch.families.llava import read_config
from megatron_patch.families.sizes import Llava
from megatron_patch.files.marks import lock
from megatron_patch.files.names import STORE, TRAINING
from megatron_patch.files.terminal import loading

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What ranks save after. A terminal that is closed sends SIGHUP; clusters (Slurm's --signal) announce the end with
SIGUSR1."""
STOPPED = tuple(128 + number for number in SIGNALS)
"""Exit codes of a run that a signal ended after it was saved."""


def is_worker() -> bool:
    """Whether this process is a rank that `launch` started; another launcher's variables make none."""
    return STORE in os.environ


def launch(config: Config, script: Path, argv: Sequence[str]) -> int:
    """Run `script` with `argv` on every process that the configuration asks for; returns the exit code.

    Raises ValueError or OSError, before anything is started, for what cannot work.
    """
    if not config.training.plan:
        check_files(config)
    llava = read_config(config.model.description)
    config.check(llava)
    nodes, node_rank = find_nodes(config)
    processes = processes_per_node(config, nodes)
    parallel, world_size = config.parallel, nodes * processes
    micro_batches = config.data.num_micro_batches(parallel, world_size)
    print(
        f"{world_size} processes (nodes x processes: {nodes} x {processes}): "
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} "
        f"x DP {world_size // parallel.model_parallel_size}, "
        f"{micro_batches} micro batches of {config.data.micro_batch_size} per iteration",
        flush=True,
    )
    if config.training.plan:
        print(report(config, llava, world_size))
        return 0
    if forking.needed():
        print(
            f"Python {platform.python_version()}: a forked process may hang before its first line, and is replaced if "
            f"it does; {forking.MENDED} need no such repair",
            flush=True,
        )
    check_devices(config, processes)
    suggest_faster(config, llava, world_size)
    check_output(config.checkpoint.output)
    where = []
    if nodes > 1:
        where += [f"--nnodes={nodes}", f"--node-rank={node_rank}"]
        where += [f"--master-addr={os.environ['MASTER_ADDR']}", f"--master-port={os.environ['MASTER_PORT']}"]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    set_gpu_environment(config)
    arguments = [*where, f"--nproc-per-node={processes}", str(script), *argv]
    log = config.checkpoint.output / "log"
    return _torchrun(arguments, log, first_rank=node_rank * processes, is_alone=nodes == 1)


def check_files(config: Config) -> None:
    """Raise FileNotFoundError for the first input folder that is not there."""
    for flag, path in (
        ("--pretrained-checkpoint", config.model.pretrained_checkpoint),
        ("--model-config", config.model.model_config),
        ("--data-path", config.data.data_path),
        ("--valid-data-path", config.data.valid_data_path),
    ):
        if path is not None and path != MOCK and not path.exists():
            raise FileNotFoundError(f"{flag} {path}: no such folder")
    for flag, path in (("--data-path", config.data.data_path), ("--valid-data-path", config.data.valid_data_path)):
        if path is not None and path.is_dir() and not (path / ".nv-meta" / "dataset.yaml").is_file():
            raise FileNotFoundError(
                f"{flag} {path}: not an energon dataset (no .nv-meta/dataset.yaml); convert_llava_pretrain_to_wds.py "
                f"makes one"
            )
    if config.model.pretrained_checkpoint is not None:
        checkpoint_folder(config.model.pretrained_checkpoint)


def check_devices(config: Config, processes: int) -> None:
    """Raise ValueError where this machine has not the GPUs that the run needs."""
    count = _device_count()
    if 0 < count < processes:
        raise ValueError(
            f"{processes} processes: each takes a GPU, and torch sees {count} here; set NPROC_PER_NODE to at most that"
        )
    if count == 0 and config.model.transformer_impl == "transformer_engine":
        raise ValueError("--transformer-impl transformer_engine: needs a GPU, and torch sees none here; use auto")
    if count == 0 and config.model.precision == "fp8":
        raise ValueError("--precision fp8: needs a GPU, and torch sees none here; use bf16")


def set_gpu_environment(config: Config) -> None:
    """Set the environment variables that a run on GPUs wants, where the user has not."""
    if _device_count() == 0:
        return
    parallel = config.parallel
    if parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1:
        # Kernels then start in the order of their launch: a collective before the product that is to hide it.
        # Megatron-LM refuses another value for GPUs before Blackwell.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Lengths vary from batch to batch, and segments of fixed sizes would leave gaps. Every torch from 2.6 on reads this
    # name, in 2.9 with a warning; the new name is ignored there. What the user says under either is left as it is.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def suggest_faster(config: Config, llava: Llava, world_size: int) -> None:
    """Print a line where less model parallelism fits this machine's GPUs and is predicted to be faster."""
    if _device_count() > 0:
        import torch

        gpu = torch.cuda.get_device_properties(0)
        card = find_card(gpu.name)
        suggestion = None if card is None else suggest(config, llava, world_size, card, gpu.total_memory)
        if suggestion is not None:
            print(line(suggestion, gpu.total_memory, "this GPU's"), flush=True)


def check_output(output: Path) -> None:
    """Make the output folder. Raises OSError that names it when nothing can be written there."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise OSError(f"--output {output}: cannot be written ({error.strerror}); give another folder") from None


def find_nodes(config: Config) -> tuple[int, int]:
    """Number of nodes and this one's rank: 1 and 0 for dsw; for dlc from the environment of a PyTorchJob."""
    if config.parallel.env == "dsw":
        return 1, 0
    missing = [name for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"--env dlc: {', '.join(missing)} not in the environment; a PyTorchJob sets it; or use dsw")
    nodes, node_rank = _number_from("WORLD_SIZE"), _number_from("RANK", least=0)
    if node_rank >= nodes:
        raise ValueError(
            f"environment variable RANK={node_rank}: expected less than WORLD_SIZE={nodes}, counted from 0"
        )
    _number_from("MASTER_PORT")
    return nodes, node_rank


def processes_per_node(config: Config, nodes: int) -> int:
    """NPROC_PER_NODE, else the pod's GPUs, else the GPUs that torch sees, else one copy of the model on CPUs."""
    if os.environ.get("NPROC_PER_NODE"):
        return _number_from("NPROC_PER_NODE")
    of_pod = "KUBERNETES_CONTAINER_RESOURCE_GPU"
    if os.environ.get(of_pod) and _number_from(of_pod, least=0) > 0:
        return _number_from(of_pod)
    return _device_count() or max(1, config.parallel.model_parallel_size // nodes)


def _device_count() -> int:
    with loading():
        import torch
    return torch.cuda.device_count()


def _number_from(name: str, least: int = 1) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise ValueError(f"environment variable {name}={text!r}: expected a whole number of {least} or more")
    return int(text)


def forget_other_launchers() -> None:
    """Take out of the environment what torchrun would obey, or hand on, that another launcher has left there.

    How many processes there are, and where, is what `launch` says; PET_SHUTDOWN_TIMEOUT alone is a setting of ours.
    """
    for name in list(os.environ):
        if name.startswith(("PET_", "TORCHELASTIC_")) and name != "PET_SHUTDOWN_TIMEOUT":
            del os.environ[name]
    # How long torchrun lets its processes save after it handed them a signal, in seconds.
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", "600")
    _number_from("PET_SHUTDOWN_TIMEOUT")


def meet_in_files(folder: str) -> list[str]:
    """torchrun's arguments, and the ranks' environment, for a run on this machine alone: nothing listens on a port.

    What torchrun's own store would take from whoever reaches it are pickles. `folder` is this user's alone.
    """
    os.environ[STORE] = f"file://{folder}/ranks"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else it opens a store besides
    # gloo's connections, each to a port of its own, stay on the machine too.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    return [
        "--nnodes=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={folder}/rendezvous",
        "--rdzv-conf=store_type=file",
        f"--rdzv-id={uuid.uuid4()}",
        "--local-addr=127.0.0.1",
    ]


def _torchrun(arguments: list[str], log: Path, first_rank: int, is_alone: bool = False) -> int:
    """Start this node's ranks, of which the first has this number, and say in one line what ended them.

    `is_alone`: there is no other node, and `arguments` name none.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    forget_other_launchers()
    logging.disable(logging.CRITICAL)  # the line below says it in one
    with tempfile.TemporaryDirectory() as folder:
        os.environ[STORE] = "env://"
        where = _meeting_place(folder) if is_alone else []
        try:
            main([f"--log-dir={folder}", f"--signals-to-handle={_signals()}", *where, *arguments])
        except SignalException as stopped:
            line = _not_saved(Path(folder), log, first_rank)
            if line is None:
                return 128 + stopped.sigval
        except ChildFailedError as failed:
            rank, failure = _first(failed.failures)
            if failure.exitcode in STOPPED:  # one of several nodes got the signal: all of them saved
                return failure.exitcode
            line = f"rank {rank}{_account(failure, log)}"
        else:
            return 0
        finally:
            del os.environ[STORE]
    print(f"error: {line}", file=sys.stderr)
    return 1


def _meeting_place(folder: str) -> list[str]:
    """torchrun's arguments for a run on this machine alone. `folder`: new, and this user's alone."""
    with Path(folder, "lock").open("wb") as file:
        has_locks = lock(file.fileno())
    if has_locks:  # by which torch keeps a store in a file
        return meet_in_files(folder)
    print(
        f"warning: {Path(folder).parent}: no file locks there, so that the ranks meet at a port, which whoever reaches "
        f"this machine may use; set TMPDIR to a folder on a local disk",
        file=sys.stderr,
    )
    return ["--standalone"]


def _signals() -> str:
    """Names of the signals that torchrun is to hand on to the ranks: no SIGHUP that nohup had this process ignore.

    A SIGINT counts also where a shell had it ignored, as it does for what it starts with `&`: somebody sent it by name.
    """
    ignores = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    wanted = (*SIGNALS, signal.SIGQUIT)
    return ",".join(number.name for number in wanted if number != signal.SIGHUP or not ignores)


def _not_saved(folder: Path, log: Path, first_rank: int) -> str | None:
    """Which rank of a run that a signal ended did not save it, and why, by what it left in torchrun's folder."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    failures = {
        first_rank + int(path.parent.name): ProcessFailure(int(path.parent.name), 0, 1, error_file=str(path))
        for path in folder.glob("*/attempt_*/*/error.json")
    }
    if failures:
        rank, failure = _first(failures)
        return f"rank {rank}{_account(failure, log)}"
    unsaved = [first_rank + int(path.parent.name) for path in folder.glob(f"*/attempt_*/*/{TRAINING}")]
    if unsaved:
        return (
            f"rank {min(unsaved)} ended before the run was saved, for which PET_SHUTDOWN_TIMEOUT gives it "
            f"{os.environ['PET_SHUTDOWN_TIMEOUT']} seconds; see {log}; the same command goes on from the save before"
        )
    return None


def _first(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that ended the others: the first that said why, else the first that ended, if by a signal."""
    said = {rank: failure for rank, failure in failures.items() if isinstance(failure.message, dict)}
    return min((said or failures).items(), key=lambda item: (item[1].timestamp, item[1].exitcode >= 0))


def _account(failure: ProcessFailure, log: Path) -> str:
    """What a rank said, or how it ended without a word."""
    if isinstance(failure.message, dict):
        return ": " + failure.message["message"].partition(": ")[2]
    if failure.exitcode < 0:
        return f" ended with signal {signal.Signals(-failure.exitcode).name}; see {log}"
    return f" ended with exit code {failure.exitcode}; see {log}"
