"""Megatron-LM's shards: a file per rank, `mp_rank_0T[_00P]/model_optim_rng.pt`, read as one whole model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.families.fused_names import to_local_name
from megatron_patch.families.layout import check_replicas, ranges, runs, unshard
from megatron_patch.families.stages import LANGUAGE_LAYER, Stage
from megatron_patch.families.table import Weight
from megatron_patch.stores import manifest
from megatron_patch.stores.reader import Reader, existing_file, open_torch_file, stored_view
from megatron_patch.tensor_io import disk
from megatron_patch.tensor_io.archives import Stored
from megatron_patch.tensor_io.disk import OutputFile
from megatron_patch.tensor_io.stream import Target, copy, read
from megatron_patch.tensor_io.torch_zip import Skipped, TorchArchive
from megatron_patch.tensor_io.view import View

FILE = "model_optim_rng.pt"
CHECKPOINT_VERSION = 3.0

# Modules of megatron.core (either spec) whose state dict holds an `_extra_state`, which strict loading asks for.
WITH_EXTRA_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")
# The stage that has this norm has an output layer, in a tied model one without a weight of its own.
LAST_NORM = "language_model.decoder.final_layernorm"


class MpRankReader(Reader):
    """Whole, unpadded tensors under the local spec's names and global layer indices, from shards at any TP and PP.

    `rows` is the model's table. `check`: compare what is read with `manifest.json`, where there is one. Raises
    ValueError or FileNotFoundError, one line that names the file and the rank, for a rank that is missing or not
    readable.
    """

    def __init__(self, folder: Path, rows: Iterable[Weight], check: bool = True) -> None:
        self.source = str(folder)
        self.rows = {weight.mcore: weight for weight in rows}
        # Global name -> that tensor's shards in the order of tensor-parallel ranks.
        self.shards: dict[str, list[View]] = {}
        self.compared: set[str] = set()
        records = manifest.read(folder) if check else None
        files = rank_files(Path(folder), records)
        loaded = [[_chunks(path, records, check) for path in paths] for paths in files]
        count = _num_chunks(files, loaded)
        # Virtual stages take turns: the first of every pipeline rank, then the second of every one.
        first_layer = 0
        last = (count - 1, len(files) - 1)
        for chunk in range(count):
            for number, (paths, ranks) in enumerate(zip(files, loaded, strict=True)):
                ends = Stage(range(0), (chunk, number) == (0, 0), (chunk, number) == last)
                first_layer += self._add_stage(paths, [chunks[chunk] for chunks in ranks], first_layer, ends)

    def _add_stage(self, paths: list[Path], models: Sequence[dict[str, View]], first_layer: int, ends: Stage) -> int:
        """Take in what the ranks of one (virtual) stage hold. Returns how many layers that are.

        `ends`: which of the model's ends it is. Without a manifest only this tells that stages are in order.
        """
        layers = 0
        for name in models[0]:
            global_name, layer = _shifted(name, first_layer)
            layers = max(layers, layer + 1)
            if layer < 0 and ends.local_name(name) is None:
                where = "last" if Stage(range(0), True, False).local_name(name) is None else "first"
                raise ValueError(
                    f"{paths[0]}: holds {name}, which only the {where} pipeline stage holds; the stages are out of "
                    "order, convert or copy the checkpoint again"
                )
            self.shards[global_name] = [_shard_of(model, name, path) for model, path in zip(models, paths, strict=True)]
        _check_same(models, paths)
        return layers

    def view(self, name: str) -> View:
        """Where one tensor's values lie. Raises ValueError when the shards of a replicated one differ."""
        shards = self.shards[name]
        if name not in self.rows:
            return shards[0]
        weight = self.rows[name]
        if weight.axis is None and len(shards) > 1 and name not in self.compared:
            # Norms and biases: small enough to be read here.
            copies = read({str(rank): shard for rank, shard in enumerate(shards)})
            check_replicas(weight, list(copies.values()))
            self.compared.add(name)
        whole = unshard(weight, shards)
        return whole.narrow(0, 0, min(whole.shape[0], weight.shape[0])) if weight.layout == "vocab" else whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without comparing its copies."""
        shape = list(self.shards[name][0].shape)
        weight = self.rows.get(name)
        if weight is not None and weight.axis is not None:
            shape[weight.axis] = sum(shard.shape[weight.axis] for shard in self.shards[name])
            if weight.layout == "vocab":
                shape[0] = min(shape[0], weight.shape[0])
        return tuple(shape)


@dataclass(frozen=True)
class Rank:
    """What one rank's file is to hold."""

    tp_rank: int
    pp_rank: int
    chunks: Sequence[dict[str, tuple[Weight, View]]]
    """Of each of its (virtual) stages the tensors, by the local spec's names, layers counted within the stage."""

    args: dict[str, Any]
    """Plain values that describe the model and its parallel sizes."""

    @property
    def tensors(self) -> dict[str, tuple[Weight, View]]:
        """All of them, in the order of the file, by the manifest's names."""
        keys = _model_keys(len(self.chunks))
        return {
            _prefix(key) + name: it for key, chunk in zip(keys, self.chunks, strict=True) for name, it in chunk.items()
        }


def write_ranks(
    folder: Path,
    ranks: Sequence[Rank],
    sizes: dict[str, int | None],
    source: Sequence[dict[str, Any]] = (),
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Write every rank's file into the new folder `folder`, reading each source once, and then the manifest.

    `sizes`: the parallel sizes, as the manifest says them. `source`: what it says about where the weights come from.
    `progress` is called with the number of bytes of each piece that is written. Raises ValueError and OSError as
    `stream.copy` does.
    """
    tp_size, pp_size = sizes["tensor_model_parallel_size"], sizes["pipeline_model_parallel_size"]
    assert tp_size is not None, "the number of virtual stages alone may be None"
    assert pp_size is not None, "the number of virtual stages alone may be None"
    files: list[OutputFile] = []
    archives: list[TorchArchive] = []
    targets: list[list[Target]] = []
    try:
        for rank in ranks:
            path = folder / rank_name(rank.tp_rank, rank.pp_rank, pp_size) / FILE
            path.parent.mkdir(parents=True)
            files.append(file := OutputFile(path))
            archives.append(archive := TorchArchive(file, _content(rank)))
            file.resize(archive.end)
            targets.append(
                [
                    Target(f"{path}: {name}", view, file, offset, runs(weight, view.rows), True)
                    for (name, (weight, view)), offset in zip(rank.tensors.items(), archive.offsets, strict=True)
                ]
            )
        copy([target for some in targets for target in some], progress)
        for file, archive, some in zip(files, archives, targets, strict=True):
            disk.reached("weights written")
            file.sync()
            archive.finish([target.crc for target in some])
            file.sync()
            disk.reached("file finished")
    finally:
        for file in files:
            file.close()
    records = [_record(folder, *of_rank, tp_size, pp_size) for of_rank in zip(ranks, targets, strict=True)]
    manifest.write(folder, {record.file.split("/")[0]: record for record in records}, sizes, source)
    disk.reached("manifest written")


def _content(rank: Rank) -> dict[str, Any]:
    """What a rank's file holds, with meta tensors."""
    models = {}
    for key, chunk in zip(_model_keys(len(rank.chunks)), rank.chunks, strict=True):
        tensors = {name: torch.empty(view.shape, dtype=view.dtype, device="meta") for name, (_, view) in chunk.items()}
        models[key] = {**tensors, **{f"{module}._extra_state": None for module in _modules_with_extra_state(chunk)}}
    return {**models, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0, "args": rank.args}


def _model_keys(num_chunks: int) -> list[str]:
    """Where a rank's file holds its stage, or each of its virtual ones."""
    return ["model"] if num_chunks == 1 else [f"model{chunk}" for chunk in range(num_chunks)]


def _prefix(key: str) -> str:
    """What precedes the names of a virtual stage in the manifest."""
    return "" if key == "model" else f"{key}."


def _record(folder: Path, rank: Rank, targets: Sequence[Target], tp_size: int, pp_size: int) -> manifest.RankRecord:
    """What the manifest says of one rank's file."""
    name = f"{rank_name(rank.tp_rank, rank.pp_rank, pp_size)}/{FILE}"
    tensors = {}
    for target, (key, (weight, view)) in zip(targets, rank.tensors.items(), strict=True):
        cut = []
        if weight.axis is not None:
            length = view.shape[weight.axis] * tp_size
            cut = [list(part) for part in ranges(weight, length, rank.tp_rank, tp_size)]
        tensors[key] = manifest.tensor_record(target, weight.mcore, weight.axis, cut)
    return manifest.file_record(folder, name, targets, tensors)


def rank_name(tp_rank: int, pp_rank: int, pp_size: int) -> str:
    """A rank's folder, in Megatron-LM's spelling."""
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp_size > 1 else "")


def rank_files(folder: Path, records: dict[str, manifest.RankRecord] | None = None) -> list[list[Path]]:
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
    if records is not None:
        _check_ranks(folder, files, records)
    else:
        _check_iterations([path for paths in files for path in paths])
    _check_sizes(files)
    return files


def _check_ranks(folder: Path, files: list[list[Path]], records: dict[str, manifest.RankRecord]) -> None:
    """Compare the ranks that are there, and their sizes, with the manifest."""
    there = {path.parent.name: path for paths in files for path in paths}
    for name in (*records, *there):
        if name not in there:
            raise FileNotFoundError(f"{folder / name}: missing, though {manifest.FILE} names it; copy it again")
        if name not in records:
            raise ValueError(
                f"{folder / name}: {manifest.FILE} does not name it; remove what is not of this checkpoint"
            )
        manifest.check_size(there[name], records[name])


def _check_iterations(paths: list[Path]) -> None:
    """Ranks that no manifest holds together say at least the same iteration."""
    contents = (open_shard(path) for path in paths)
    found = [content.get("iteration") if isinstance(content, dict) else None for content in contents]
    for path, iteration in zip(paths, found, strict=True):
        if iteration != found[0]:
            raise ValueError(
                f"{path}: says iteration {iteration}, {paths[0]} says {found[0]}; copy the shards of one checkpoint"
            )


def _check_sizes(files: list[list[Path]]) -> None:
    """Compare the ranks found with what the first one says of its run: a missing last rank leaves no gap."""
    args = saved_args(files[0][0])
    found = {"tensor_model_parallel_size": len(files[0]), "pipeline_model_parallel_size": len(files)}
    for name, count in found.items():
        if args.get(name, count) != count:
            raise ValueError(
                f"{files[0][0]}: says {name} {args[name]}, but mp_rank folders for {count} are there; "
                "convert or copy the checkpoint again"
            )


def open_shard(path: Path) -> Any:
    """What a rank's file holds. Of Megatron-LM's own, random states and settings are objects: these are skipped."""
    return open_torch_file(path, skip=True)


def saved_args(path: Path) -> dict[str, Any]:
    """What a file of torch.save says of the run or model that it is of; {} where it says nothing that is read here."""
    content = open_shard(path)
    args = content.get("args") if isinstance(content, dict) else None
    return args if isinstance(args, dict) else {}


def model_parts(path: Path, content: Any) -> dict[str, dict[str, Any]]:
    """What a rank's file holds: `model`, or `model0`, `model1`, ... of virtual stages. Raises ValueError for less."""
    named = content.items() if isinstance(content, dict) else ()
    found = {key: part for key, part in named if re.fullmatch(r"model\d*", str(key)) and isinstance(part, dict)}
    if not found:
        raise ValueError(f"{path}: has no 'model', nor 'model0', ...; expected a Megatron-Core shard")
    expected = ["model"] if "model" in found else [f"model{chunk}" for chunk in range(len(found))]
    if found.keys() != set(expected):
        raise ValueError(f"{path}: holds {', '.join(found)}; expected 'model', or 'model0' and so on without a gap")
    for name, value in (item for part in found.values() for item in part.items()):
        if not isinstance(name, str) or isinstance(value, Skipped):
            raise ValueError(f"{path}: {name} is an object, or its name is no text; expected tensors by their names")
    return {key: found[key] for key in expected}


def _chunks(path: Path, records: dict[str, manifest.RankRecord] | None, check: bool) -> list[dict[str, View]]:
    """The tensors of each (virtual) stage in a rank's file, by the local spec's names; `_extra_state` is left out."""
    parts = {
        key: {name: value for name, value in part.items() if not name.endswith("._extra_state")}
        for key, part in model_parts(path, open_shard(path)).items()
    }
    values = {_prefix(key) + name: value for key, part in parts.items() for name, value in part.items()}
    for name, value in values.items():
        if not isinstance(value, Stored | Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}; expected a tensor")
    digests: dict[str, list[tuple[int, str]]] = {}
    if records is not None:
        record = records[path.parent.name]
        manifest.check_rank(path, record, {name: _found(path, name, value) for name, value in values.items()})
        digests = {name: list(zip(tensor.rows, tensor.sha256, strict=True)) for name, tensor in record.tensors.items()}
    views = {name: stored_view(path, name, value, digests.get(name, ())) for name, value in values.items()}
    if not check:
        views = {name: view.unchecked() for name, view in views.items()}
    return [{to_local_name(name): views[_prefix(key) + name] for name in part} for key, part in parts.items()]


def _num_chunks(files: list[list[Path]], loaded: list[list[list[dict[str, View]]]]) -> int:
    """How many virtual stages a rank holds. Raises ValueError when ranks differ."""
    counts = {
        path: len(chunks) for row, of in zip(files, loaded, strict=True) for path, chunks in zip(row, of, strict=True)
    }
    (first, expected), *others = counts.items()
    for path, count in others:
        if count != expected:
            raise ValueError(f"{path}: holds {count} virtual stages, {first} {expected}; convert or copy it again")
    return expected


def _found(path: Path, name: str, value: Stored | Tensor) -> tuple[str, list[int], int, int]:
    if isinstance(value, Tensor):
        raise ValueError(f"{path}: {name} is not stored as {manifest.FILE} says; copy or convert the checkpoint again")
    size = torch.Size(value.shape).numel() * value.dtype.itemsize
    return manifest.dtype_name(value.dtype), list(value.shape), value.offset, size


def _shifted(name: str, first_layer: int) -> tuple[str, int]:
    """A stage's name -> the whole model's; and the layer's index within the stage, -1 outside of the layers."""
    match = LANGUAGE_LAYER.fullmatch(name)
    if not match:
        return name, -1
    return f"{match[1]}{int(match[2]) + first_layer}{match[3]}", int(match[2])


def _shard_of(model: dict[str, View], name: str, path: Path) -> View:
    if name not in model:
        raise ValueError(f"{path}: has no {name}, which tensor-parallel rank 0 has; convert or copy it again")
    return model[name]


def _check_same(models: Sequence[dict[str, View]], paths: list[Path]) -> None:
    """Ranks of one stage hold the same names in the same types."""
    for model, path in zip(models, paths, strict=True):
        for name in model.keys() - models[0].keys():
            raise ValueError(f"{path}: holds {name}, which tensor-parallel rank 0 has not; convert or copy it again")
        for name, view in model.items():
            own, first = manifest.dtype_name(view.dtype), manifest.dtype_name(models[0][name].dtype)
            if own != first:
                raise ValueError(f"{path}: {name} is {own}, rank 0's is {first}; convert or copy the checkpoint again")


def _modules_with_extra_state(model: Iterable[str]) -> list[str]:
    modules = dict.fromkeys(name.rpartition(".")[0] for name in model)
    if LAST_NORM in modules:
        modules["language_model.output_layer"] = None
    return [module for module in modules if module.rpartition(".")[2] in WITH_EXTRA_STATE]
