"""A training script whose ranks end in ways that are named in its arguments, started by torchrun as the real one is.

    OUTPUT NODES NODE_RANK PORT END [END ...]    (one end per rank)

The model, its groups and the loop are left out: what is tested is who learns of an end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from megatron_patch.training.launch import _torchrun


def blocked() -> int:
    """Wait in C without Python's global lock, for what never comes, as in a collective of NCCL; no signal ends it."""
    from megatron_patch.training.stopping import Stop

    Stop(None)  # as the loop does; SIGTERM is only noted from now on
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    ready()
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
    raise AssertionError("not reached")


def raises() -> int:
    all_ready()
    raise ValueError("the disk is full")


def killed() -> int:
    all_ready()
    os.kill(os.getpid(), signal.SIGKILL)


def saves() -> int:
    """What a signal asks for, which takes this rank longer than another."""
    from megatron_patch.training.stopping import Stop

    stop = Stop(None)
    ready()
    while not stop._noted:
        time.sleep(0.01)
    time.sleep(2 * int(os.environ["RANK"]))
    return 128 + stop._noted


def ready() -> None:
    Path(sys.argv[1], f"ready_{os.environ['RANK']}").touch()


def all_ready() -> None:
    """Wait for all ranks, and note when."""
    ready()
    while len(list(Path(sys.argv[1]).glob("ready_*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
    Path(sys.argv[1], "failed").touch()


def launch(errors: Path, arguments: list[str]) -> None:
    """The launcher, in a process of its own whose errors go into a file; its ranks run this file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    output, nodes, node_rank, port, *ends = arguments
    ranks = len(ends) // int(nodes)
    where = [f"--nnodes={nodes}", f"--node-rank={node_rank}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    words = [*where, f"--nproc-per-node={ranks}", __file__, *arguments]
    sys.exit(_torchrun(words, Path(output, "log"), first_rank=int(node_rank) * ranks))


def main() -> int:
    output, _, _, _, *ends = sys.argv[1:]
    end, _, place = ends[int(os.environ["RANK"])].partition(" in ")
    action = globals()[end]
    start = action if place == "start" else lambda *arguments: None
    # Mocks: seconds of imports that have no part in this.
    sys.modules["megatron_patch.model.groups"] = SimpleNamespace(
        start=lambda *arguments, **rank: start(), stop=lambda: None
    )
    sys.modules["megatron_patch.training.loop"] = SimpleNamespace(train=lambda config: action())
    from megatron_patch.training import peers
    from megatron_patch.training.worker import run

    if end == "saves":
        peers.INTERVAL = peers.GRACE = 0.1
    return run(
        SimpleNamespace(
            checkpoint=SimpleNamespace(output=Path(output), folder=Path(output, "checkpoint")),
            parallel=None,
            training=SimpleNamespace(seed=1, distributed_timeout_minutes=10),
        )
    )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
