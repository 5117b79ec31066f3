"""A run goes on from its last checkpoint: what `saving` wrote, found, checked and loaded.

No random state: a step draws no random number (every dropout is 0), and the data's own lies in its position.
The learning rate follows from the iteration.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pickle
import platform
import shutil
import uuid
from collections.abc import Callable, Container
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_patch.config.train import Config
from megatron_patch.conversion.companions import TRACKER, checkpoint_folder, read_json
from megatron_patch.data.preprocessor import has_preprocessor, read_image_settings
from megatron_patch.families.llava import read_config
from megatron_patch.families.sizes import plain
from megatron_patch.files.marks import beside, claim, discard
from megatron_patch.files.names import CONFIG, RUN_CONFIG
from megatron_patch.model.llava import LlavaModel
from megatron_patch.stores import checksums
from megatron_patch.stores.torch_dist import read_metadata
from megatron_patch.tensor_io import disk
from megatron_patch.tensor_io.opcodes import why_not_loaded
from megatron_patch.tensor_io.pickles import check_extra_state

EXTRA_STATE = "_extra_state"
PATIENCE = timedelta(hours=6)
"""How long ranks wait for those whose disk is slower; --distributed-timeout-minutes is for computing."""
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    iteration: int = 0
    """Iterations done."""
    consumed_samples: int = 0


def latest(folder: Path, step: int | None = None) -> Path | None:
    """The newest whole checkpoint of a run in `folder`, None when there is none yet; or that of iteration `step`.

    Raises ValueError or OSError when the tracker file names no checkpoint that a run can go on from.
    """
    if step is None and not (folder / TRACKER).exists():
        there = saved(folder)
        if there:
            raise ValueError(
                f"{folder}: has {there[-1].name} and no {TRACKER}; write the iteration to go on from into it, or give "
                f"another output folder to start over"
            )
        return None
    checkpoint = checkpoint_folder(folder, step)
    if not (checkpoint / RUN_CONFIG).is_file():
        raise ValueError(
            f"{checkpoint}: not the checkpoint of a training run; give another output folder, "
            f"and this one as --pretrained-checkpoint to start from its weights"
        )
    return checkpoint


def find(config: Config) -> Path | None:
    """The checkpoint that the run goes on from, None when it has none yet. Collective.

    Raises ValueError or OSError, one line and the same on every rank, for a folder that not all ranks share, and for a
    checkpoint that is damaged or of another training.
    """
    folder = config.checkpoint.folder
    _check_shared(folder)
    agree(try_save, folder)
    checkpoint = agree(latest, folder, config.checkpoint.ckpt_step, rank=0)
    if checkpoint is not None:
        agree(_check_files, checkpoint)
        agree(_check_same_training, config, checkpoint)
        agree(_check_same_model, config.model.description, folder, rank=0)
    return checkpoint


def load(checkpoint: Path, chunks: list[LlavaModel], optimizer: MegatronOptimizer) -> Progress:
    """Restore weights and optimizer from a checkpoint that `find` gave, at any parallel sizes.

    Raises ValueError where its tensors are not those of this run's model and optimizer.
    """
    model = model_state(chunks)
    stored = read_metadata(checkpoint / ".metadata").state_dict_metadata if chunks[0].config.fp8 else {}
    wanted = {name: _wanted(tensors, stored) for name, tensors in model.items()}
    try:
        state = dist_checkpointing.load(
            {**wanted, "optimizer": optimizer_state(optimizer, model, is_loading=True)},
            str(checkpoint),
            strict=StrictHandling.RAISE_UNEXPECTED,
        )
        for name, chunk in zip(model, chunks, strict=True):
            for key in (key for key in state[name] if key.endswith(EXTRA_STATE)):
                _check_extra_state(key, state[name][key])
            missing, unexpected = chunk.load_state_dict(state[name], strict=False)
            if wrong := [key for key in (*missing, *unexpected) if not key.endswith(EXTRA_STATE)]:
                raise KeyError(wrong[0])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
        if not all(isinstance(number, int) and number >= 0 for number in dataclasses.astuple(progress)):
            raise TypeError(f"it says {progress}")
    # The files are what was written: something of all kinds is not as it was then. torch's is no Exception.
    except (Exception, CheckpointException) as error:
        cause = _first_cause(error)
        if isinstance(cause, pickle.UnpicklingError):
            raise ValueError(f"{checkpoint}: holds more than tensors and values ({why_not_loaded(cause)})") from error
        reason = " ".join(str(cause).split())[:200]
        raise ValueError(
            f"{checkpoint}: does not fit this run ({type(cause).__name__}: {reason}); resume with the settings of its "
            f"{RUN_CONFIG}, or begin a new run with it as --pretrained-checkpoint"
        ) from error
    return progress


def _check_extra_state(key: str, state: object) -> None:
    try:
        check_extra_state(state)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _first_cause(error: BaseException) -> BaseException:
    """Of what torch gathered from all ranks, the first that one of them met."""
    if isinstance(error, CheckpointException) and error.failures:
        return min(error.failures.items())[1][0]
    return error


def _wanted(model: dict[str, Any], stored: Container[str]) -> dict[str, Any]:
    """What to load of a chunk: all tensors, and of Transformer Engine's extra states those that are in `stored`.

    Local layers write none for norms. They hold fp8's scales or nothing, and are pickles, which are looked through
    before Transformer Engine gets them; a run without fp8 loads none.
    """
    return {key: value for key, value in model.items() if not key.endswith(EXTRA_STATE) or value.unique_key in stored}


def _check_shared(folder: Path) -> None:
    """Raise ValueError, on every rank, when one does not see what rank 0 writes into `folder`."""
    path = agree(_mark, folder, rank=0)
    try:
        agree(_check_seen, path)
    finally:
        if dist.get_rank() == 0:
            path.unlink(missing_ok=True)


def try_save(folder: Path) -> None:
    """Take the steps of a save on a rank's disk, so that a run does not learn at its first save that one fails.

    Raises OSError that names `folder` and the step.
    """
    trial, done = beside(folder / "trial"), beside(folder / "trial")
    steps = {
        "make a folder": lambda: trial.mkdir(parents=True),
        "write a file": lambda: (trial / "file").write_bytes(b"1"),
        "have it on the disk": lambda: disk.sync_tree(trial),
        "rename a folder": lambda: trial.rename(done),
        "replace a file": lambda: (done / "file").rename(done / "tracker"),
        "remove a folder": lambda: shutil.rmtree(done),
    }
    for step, take in steps.items():
        try:
            take()
        except OSError as error:
            for left in (trial, done):
                shutil.rmtree(left, ignore_errors=True)
            raise OSError(
                f"{folder}: a run cannot be saved there, since it fails to {step} ({error.strerror}); give another "
                f"--output"
            ) from error


def _mark(folder: Path) -> Path:
    """An empty file there, of a name that no machine remembers as missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{uuid.uuid4().hex}"
    path.touch()
    return path


def _check_seen(path: Path) -> None:
    if not path.exists():
        raise ValueError(
            f"{path.parent}: rank {dist.get_rank()} on {platform.node()} does not see what rank 0 writes there; give "
            f"an output folder that all nodes share"
        )


def _check_files(checkpoint: Path) -> None:
    """This rank's share of: nothing is damaged, and `.metadata`, which megatron.core unpickles, holds only values."""
    try:
        checksums.check(checkpoint, dist.get_rank(), dist.get_world_size())
        read_metadata(checkpoint / ".metadata")
    except ValueError as error:
        raise ValueError(f"{error}; write an earlier iteration into {checkpoint.parent / TRACKER}") from None


def read_position(checkpoint: Path, rank: int, load: Callable[[bytes], T]) -> T:
    """The place in the data of a data-parallel rank, as `load` gives it. Raises ValueError that names the file."""
    path = position_file(checkpoint, rank)
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; copy the checkpoint again, or go on from an earlier one") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; copy the checkpoint again, or go on from an earlier one") from error


def model_state(chunks: list[LlavaModel]) -> dict[str, Any]:
    """Each chunk's tensors. Their keys on the disk are the whole model's, however it is sharded."""
    return {f"model{index}": chunk.sharded_state_dict(metadata=_metadata()) for index, chunk in enumerate(chunks)}


def optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    """The optimizer's tensors. `model`: what `model_state` gave."""
    parts = model if len(model) > 1 else model["model0"]
    return optimizer.sharded_state_dict(parts, is_loading=is_loading, metadata=_metadata())


def _metadata() -> dict[str, Any]:
    """How the optimizer is stored: so that it can be loaded at any parallel sizes."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def position_file(checkpoint: Path, rank: int) -> Path:
    """Where the place in the data of a data-parallel rank lies."""
    return checkpoint / f"data_position_{rank:03d}.pt"


def _check_same_training(config: Config, checkpoint: Path) -> None:
    """Raise ValueError when what is trained, or how its states are kept, is not what the checkpoint holds."""
    before = read_json(checkpoint, RUN_CONFIG)
    now = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    for part, name in (("parallel", "use_distributed_optimizer"), ("model", "freeze_lm"), ("model", "freeze_vit")):
        saved_with = before[part].get(name) if isinstance(before.get(part), dict) else None
        if saved_with != now[part][name]:
            raise ValueError(
                f"{checkpoint}: saved with --{name.replace('_', '-')} {str(saved_with).lower()}, which keeps "
                f"other optimizer states; resume with the same, or begin a new run with it as --pretrained-checkpoint"
            )


def _check_same_model(description: Path, folder: Path) -> None:
    """Raise ValueError when `description` is not of the model whose run is in `folder`, be the shapes the same."""
    if not (folder / CONFIG).is_file():
        return  # removed by hand, and written again
    before, now = _facts(folder), _facts(description)
    for name in before:
        if before[name] != now[name]:
            raise ValueError(
                f"{description}: {name} is {now[name]}, and the run in {folder} has {before[name]}; give the model "
                f"that it began with, or another output folder"
            )


def _facts(folder: Path) -> dict[str, Any]:
    """What training depends on besides weights: sizes, numbers in the network's formulas, tokenizer, pixels' range."""
    llava = read_config(folder)
    parts = {"the language model": llava.language, "the vision tower": llava.vision}
    facts = {f"{name} of {part}": value for part, sizes in parts.items() for name, value in plain(sizes).items()}
    files = (path for path in (folder / "tokenizer.json", folder / "tokenizer.model") if path.is_file())
    tokenizer = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
    pixels = read_image_settings(folder) if has_preprocessor(folder) else None
    ranges = {f"image_{name}": getattr(pixels, name, None) for name in ("mean", "std")}
    return {**facts, "the image token's id": llava.image_token_id, "the tokenizer's sha256": tokenizer, **ranges}


def remove_partial(folder: Path) -> None:
    """Remove what a killed run had not finished. Only for the one that holds `folder`.

    Raises ValueError for what lies at such a name and is no run's: it would be in the way of a save.
    """
    for partial in sorted(folder.glob("iter_*.partial")):
        claim(partial)
        discard(partial)


def saved(folder: Path) -> list[Path]:
    """The iterations in a run's folder, oldest first."""
    return sorted(folder.glob("iter_" + 7 * "[0-9]"))


def agree(action: Callable[..., T], *arguments: Any, rank: int | None = None) -> T:
    """What `action(*arguments)` gives here, or on `rank` alone. Where it raises OSError or ValueError, all ranks do.

    Waits for the slowest for as long as a disk may take.
    """
    result: Any = None
    error = None
    try:
        if rank in (None, dist.get_rank()):
            result = action(*arguments)
    except (OSError, ValueError) as caught:
        error = caught
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (error, None if rank is None else result), group=_patient(dist.group.WORLD))
    for error, _ in reports:
        if error is not None:
            raise error
    return result if rank is None else reports[rank][1]


@functools.lru_cache(maxsize=1)
def _patient(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same processes for what waits for disks."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group
