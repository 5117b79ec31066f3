"""Megatron-LM's shards: a file per rank, `mp_rank_0T[_00P]/model_optim_rng.pt`, read as one whole model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.checkpoint.reader import Reader, existing_file, load_tensors
from megatron_patch.families.family import Weight
from megatron_patch.families.layout import unshard
from megatron_patch.families.transformer_engine import to_local_name

FILE = "model_optim_rng.pt"
CHECKPOINT_VERSION = 3.0
LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)(\..*)")

# Modules of megatron.core (either spec) whose state dict holds an `_extra_state`, which strict loading asks for.
WITH_EXTRA_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")


class MpRankReader(Reader):
    """Whole, unpadded tensors under the local spec's names and global layer indices, from shards at any TP and PP.

    `rows` is the model's table. Raises ValueError or FileNotFoundError, one line that names the file and the rank, for
    a rank that is missing or not readable.
    """

    def __init__(self, folder: Path, rows: Iterable[Weight]) -> None:
        self.source = str(folder)
        self.rows = {weight.mcore: weight for weight in rows}
        # Global name -> that tensor's shards in the order of tensor-parallel ranks.
        self.shards: dict[str, list[Tensor]] = {}
        first_layer = 0
        for paths in _rank_files(Path(folder)):
            models = [_load_model(path) for path in paths]
            layers = 0
            for name in models[0]:
                global_name, layer = _shifted(name, first_layer)
                layers = max(layers, layer + 1)
                self.shards[global_name] = [
                    _shard_of(model, name, path) for model, path in zip(models, paths, strict=True)
                ]
            _check_same_names(models, paths)
            first_layer += layers

    def __getitem__(self, name: str) -> Tensor:
        """Raises ValueError when replicated shards differ."""
        shards = self.shards[name]
        if name not in self.rows:
            return shards[0]
        weight = self.rows[name]
        whole = unshard(weight, shards) if len(shards) > 1 else shards[0]
        return whole[: weight.shape[0]] if weight.layout == "vocab" else whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = list(self.shards[name][0].shape)
        weight = self.rows.get(name)
        if weight is not None and weight.axis is not None:
            shape[weight.axis] = sum(shard.shape[weight.axis] for shard in self.shards[name])
            if weight.layout == "vocab":
                shape[0] = min(shape[0], weight.shape[0])
        return tuple(shape)


def write_rank(folder: Path, rank_name: str, model: dict[str, Tensor], args: dict[str, Any]) -> None:
    """Write one rank's `model` (local spec's names). `args`: plain values that describe the model and its cut."""
    extra = {f"{module}._extra_state": None for module in _modules_with_extra_state(model)}
    content = {
        "model": {**model, **extra},
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "args": args,
    }
    path = folder / rank_name / FILE
    path.parent.mkdir(parents=True)
    torch.save(content, path)


def rank_name(tp_rank: int, pp_rank: int, pp_size: int) -> str:
    """A rank's folder, in Megatron-LM's spelling."""
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp_size > 1 else "")


def _rank_files(folder: Path) -> list[list[Path]]:
    """Every rank's file: a list per pipeline stage, in it one per tensor-parallel rank."""
    found = {}
    for path in folder.iterdir():
        match = re.fullmatch(r"mp_rank_(\d{2,})(?:_(\d{3,}))?", path.name)
        if match:
            found[int(match[2] or 0), int(match[1])] = path
    if not found:
        raise FileNotFoundError(f"{folder}: holds no mp_rank_* folder; expected Megatron-Core shards")
    stages = max(stage for stage, _ in found) + 1
    ranks = max(rank for _, rank in found) + 1
    for stage in range(stages):
        for rank in range(ranks):
            if (stage, rank) not in found:
                missing = rank_name(rank, stage, stages)
                raise FileNotFoundError(f"{folder / missing}: missing; {ranks} x {stages} ranks (TP x PP) are there")
    what = "every rank has one; convert or copy the checkpoint again"
    files = [[existing_file(found[s, r], FILE, what) for r in range(ranks)] for s in range(stages)]
    _check_sizes(files)
    return files


def _check_sizes(files: list[list[Path]]) -> None:
    """Compare the ranks found with what the first one says of its run: a missing last rank leaves no gap."""
    args = load_tensors(files[0][0]).get("args")
    if not isinstance(args, dict):
        return
    found = {"tensor_model_parallel_size": len(files[0]), "pipeline_model_parallel_size": len(files)}
    for name, count in found.items():
        if args.get(name, count) != count:
            raise ValueError(
                f"{files[0][0]}: says {name} {args[name]}, but mp_rank folders for {count} are there; "
                "convert or copy the checkpoint again"
            )


def _load_model(path: Path) -> dict[str, Tensor]:
    """A rank's tensors under the local spec's names, mapped into memory; `_extra_state` left out."""
    content = load_tensors(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path}: has no 'model'; expected a Megatron-Core shard without virtual pipeline stages")
    model = {}
    for name, value in content["model"].items():
        if name.endswith("._extra_state"):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}; expected a tensor")
        model[to_local_name(name)] = value
    return model


def _shifted(name: str, first_layer: int) -> tuple[str, int]:
    """A stage's name -> the whole model's; and the layer's index within the stage, -1 outside of the layers."""
    match = LAYER.fullmatch(name)
    if not match:
        return name, -1
    return f"{match[1]}{int(match[2]) + first_layer}{match[3]}", int(match[2])


def _shard_of(model: dict[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in model:
        raise ValueError(f"{path}: has no {name}, which tensor-parallel rank 0 has; convert or copy it again")
    return model[name]


def _check_same_names(models: list[dict[str, Tensor]], paths: list[Path]) -> None:
    for model, path in zip(models, paths, strict=True):
        for name in model.keys() - models[0].keys():
            raise ValueError(f"{path}: holds {name}, which tensor-parallel rank 0 has not; convert or copy it again")


def _modules_with_extra_state(model: dict[str, Tensor]) -> list[str]:
    modules = dict.fromkeys(name.rpartition(".")[0] for name in model)
    return [module for module in modules if module.rpartition(".")[2] in WITH_EXTRA_STATE]
