"""Training state on disk: weights, optimizer, iteration and position in the data, in megatron.core's torch_dist format.

No random state: a step draws no random number (every dropout is 0), and the data's own lies in its position.
The learning rate follows from the iteration.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer

from megatron_patch.checkpoint.companions import TRACKER, checkpoint_folder
from megatron_patch.config import Config
from megatron_patch.model.llava import LlavaModel

CONFIG = "run_config.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    iteration: int = 0
    """Iterations done."""
    consumed_samples: int = 0


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run in `folder`, None when there is none yet.

    Raises ValueError or OSError when the tracker file names no checkpoint that a run can go on from.
    """
    if not (folder / TRACKER).exists():
        saved = _saved(folder)
        if saved:
            raise ValueError(
                f"{folder}: has {saved[-1].name} and no {TRACKER}; write the iteration to go on from into it, or give "
                f"another output folder to start anew"
            )
        return None
    checkpoint = checkpoint_folder(folder)
    if not (checkpoint / CONFIG).is_file():
        raise ValueError(
            f"{checkpoint}: not the checkpoint of a training run; give another output folder, "
            f"and this one as --pretrained-checkpoint to start from its weights"
        )
    return checkpoint


def save(
    config: Config, chunks: list[LlavaModel], optimizer: MegatronOptimizer, progress: Progress, position: bytes | None
) -> Path:
    """Write a checkpoint of all ranks together; the tracker names it only when it is whole.

    `position`: this data-parallel rank's place in the data, given by exactly one rank of each (None: by another one).
    """
    folder = config.checkpoint.folder
    target = folder / f"iter_{progress.iteration:07d}"
    partial = folder / f"{target.name}.partial"
    _on_rank_0(lambda: _make_empty(partial))
    model_state = _model_state(chunks)
    dist_checkpointing.save(
        {
            **model_state,
            "optimizer": _optimizer_state(optimizer, model_state, is_loading=False),
            "progress": dataclasses.asdict(progress),
        },
        str(partial),
    )
    if position is not None:
        _position_file(partial).write_bytes(position)
    dist.barrier()
    _on_rank_0(lambda: _publish(config, partial, target))
    return target


def load(config: Config, checkpoint: Path, chunks: list[LlavaModel], optimizer: MegatronOptimizer) -> Progress:
    """Restore weights and optimizer from a checkpoint that `save` wrote, at any parallel sizes."""
    _check_same_training(config, checkpoint)
    model_state = _model_state(chunks)
    state = dist_checkpointing.load(
        {**model_state, "optimizer": _optimizer_state(optimizer, model_state, is_loading=True)},
        str(checkpoint),
        strict=StrictHandling.RAISE_UNEXPECTED,
    )
    for name, chunk in zip(model_state, chunks, strict=True):
        chunk.load_state_dict(state[name])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


def load_position(checkpoint: Path) -> bytes:
    """This data-parallel rank's place in the data, as it was given to `save`."""
    path = _position_file(checkpoint)
    if not path.exists():
        raise ValueError(
            f"{path}: missing; the run was saved with fewer data-parallel ranks, and the data cannot be continued "
            f"exactly; start with the same number of processes and the same parallel sizes"
        )
    return path.read_bytes()


def _model_state(chunks: list[LlavaModel]) -> dict[str, Any]:
    """Each chunk's tensors. Their keys on the disk are the whole model's, however it is cut."""
    return {f"model{index}": chunk.sharded_state_dict(metadata=_metadata()) for index, chunk in enumerate(chunks)}


def _optimizer_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    parts = model_state if len(model_state) > 1 else model_state["model0"]
    return optimizer.sharded_state_dict(parts, is_loading=is_loading, metadata=_metadata())


def _metadata() -> dict[str, Any]:
    """How the optimizer is stored: so that it can be loaded at any parallel sizes."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _position_file(checkpoint: Path) -> Path:
    return checkpoint / f"data_position_{parallel_state.get_data_parallel_rank():03d}.pt"


def _check_same_training(config: Config, checkpoint: Path) -> None:
    """Raise ValueError when what is trained, or how its states are kept, is not what the checkpoint holds."""
    saved = json.loads((checkpoint / CONFIG).read_text())
    now = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    for part, name in (("parallel", "use_distributed_optimizer"), ("model", "freeze_lm"), ("model", "freeze_vit")):
        if saved[part][name] != now[part][name]:
            raise ValueError(
                f"{checkpoint}: saved with --{name.replace('_', '-')} {str(saved[part][name]).lower()}, which keeps "
                f"other optimizer states; resume with the same, or begin a new run with it as --pretrained-checkpoint"
            )


def remove_partial(folder: Path) -> None:
    """Remove what a killed run had not finished. Only for the one that holds `folder`."""
    for partial in folder.glob("iter_*.partial"):
        shutil.rmtree(partial)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(config: Config, partial: Path, target: Path) -> None:
    """Data, folder, rename, folder, tracker: each on the disk before the next."""
    (partial / CONFIG).write_text(json.dumps(dataclasses.asdict(config), default=str, indent=2))
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    # What lies there is not named by the tracker: a run was killed between this rename and the tracker's.
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _sync(target.parent)
    temporary = target.parent / f"{TRACKER}.partial"
    temporary.write_text(str(int(target.name.removeprefix("iter_"))))
    _sync(temporary)
    temporary.rename(target.parent / TRACKER)
    _sync(target.parent)
    if config.checkpoint.keep_checkpoints is not None:
        for old in _saved(target.parent)[: -config.checkpoint.keep_checkpoints]:
            shutil.rmtree(old)


def _saved(folder: Path) -> list[Path]:
    """The iterations in a run's folder, oldest first."""
    return sorted(folder.glob("iter_" + 7 * "[0-9]"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _on_rank_0(action: Callable[[], None]) -> None:
    """Do something to files once; the others wait, and fail with it."""
    error = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as caught:
            error = [caught]
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]
