"""What a checkpoint is, of any format, from its headers and json files alone: no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_patch.conversion import companions
from megatron_patch.families.hf_config import describe, describe_language_model, describe_vision_model
from megatron_patch.families.llava_repository import is_repository, text_config, tower_name
from megatron_patch.families.sizes import LanguageModel, VisionModel
from megatron_patch.files.names import model_folder
from megatron_patch.stores import checksums, manifest
from megatron_patch.stores.hf import HfReader
from megatron_patch.stores.hf_files import ORDER, passed_over, refuse_adapter, weight_file
from megatron_patch.stores.mp_rank import model_parts, open_shard, rank_files
from megatron_patch.stores.torch_dist import model_tensors, read_metadata


@dataclass(frozen=True)
class Contents:
    """Tensors as they lie on the disk."""

    kind: str
    tensors: list[tuple[torch.dtype, tuple[int, ...]]]
    files: list[Path]
    notes: dict[str, str]


def summarize(path: Path) -> dict[str, str]:
    """What there is to say about the checkpoint in the folder `path`, by title.

    Raises ValueError or OSError, one line, for a folder that holds none, or one that is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: not a folder; expected the folder of a checkpoint")
    stored = _stored(path)
    count = sum(math.prod(shape) for _, shape in stored.tensors)
    types = Counter(manifest.dtype_name(dtype) for dtype, _ in stored.tensors)
    size = sum(file.stat().st_size for file in stored.files)
    return {
        "format": stored.kind,
        **stored.notes,
        **_model(path),
        "tensors": f"{len(stored.tensors)}: " + ", ".join(f"{number} {name}" for name, number in types.most_common()),
        "values": f"{count:,} ({count / 1e9:.2f} billion)",
        "size": f"{size:,} bytes ({size / 1e9:.2f} GB) in {len(stored.files)} files",
    }


def _stored(path: Path) -> Contents:
    """Find out the format."""
    if (path / companions.TRACKER).is_file():
        folder = companions.checkpoint_folder(path)
        text = (path / companions.TRACKER).read_text().strip()
        found = _megatron_core(folder)
        return Contents(found.kind, found.tensors, found.files, {"iteration": text, **found.notes})
    if (path / ".metadata").is_file() or any(path.glob("mp_rank_*")):
        return _megatron_core(path)
    return _hugging_face(path)


def _hugging_face(path: Path) -> Contents:
    notes = {}
    try:
        refuse_adapter(path)
    except ValueError as error:
        if not any((path / name).is_file() for name in ORDER):
            raise
        notes["adapter"] = str(error)
    try:
        others = passed_over(path)
    except FileNotFoundError as error:
        raise ValueError(f"{error}; or of Megatron-Core: {companions.TRACKER}, mp_rank_*, .metadata") from None
    if others:
        notes["not the model"] = f"{', '.join(others)}: transformers reads {weight_file(path).name}"
    reader = HfReader(path)
    views = [reader.view(name) for name in reader]
    files = reader.files()
    kind = "Hugging Face, " + ("safetensors" if files[0].suffix == ".safetensors" else "torch.save")
    return Contents(kind, [(view.dtype, view.shape) for view in views], files, notes)


def _megatron_core(folder: Path) -> Contents:
    if (folder / ".metadata").is_file():
        metadata = read_metadata(folder / ".metadata")
        model = model_tensors(metadata)
        tensors = [(stored.properties.dtype, tuple(stored.size)) for stored in model.values()]
        others = sum("_extra_state" not in key for key in metadata.state_dict_metadata.keys() - model.keys())
        notes = {"beside the model": f"{others} entries of optimizer and progress"} if others else {}
        notes["manifest"] = _sums(folder) or _manifest(folder)
        return Contents("Megatron-Core, torch_dist", tensors, sorted(folder.glob("*.distcp")), notes)
    stages = rank_files(folder)
    files = [file for ranks in stages for file in ranks]
    tensors = [tensor for file in files for tensor in _rank_tensors(file)]
    notes = {
        "parallel sizes": f"TP {len(stages[0])} x PP {len(stages)}; values and tensors below are those of all ranks",
        "manifest": _manifest(folder),
    }
    return Contents("Megatron-Core, mp_rank shards", tensors, files, notes)


def _rank_tensors(file: Path) -> Iterator[tuple[torch.dtype, tuple[int, ...]]]:
    values = (value for model in model_parts(file, open_shard(file)).values() for value in model.values())
    return ((value.dtype, tuple(value.shape)) for value in values if hasattr(value, "shape"))


def _sums(folder: Path) -> str:
    """Of a run's checkpoint, which has no manifest."""
    if not (folder / checksums.FILE).is_file():
        return ""
    return f"none: {checksums.FILE} lists {len(checksums.read(folder))} files, which are compared when it is read"


def _manifest(folder: Path) -> str:
    content = manifest.load(folder)
    if content is None:
        return "none: damage would not be noticed"
    sources = ", ".join(str(source["file"]) for source in content["source"]) or "not said"
    tools = ", ".join(f"{name} {version}" for name, version in content["tools"].items())
    return f"made of {sources}; by {tools}"


def _model(path: Path) -> dict[str, str]:
    """What config.json says, where there is one: beside the weights, or beside the iteration's folder."""
    folder = model_folder(path)
    if not (folder / companions.CONFIG).is_file():
        return {"model": "no config.json"}
    config = companions.read_json(folder)
    kind = str(config.get("model_type"))
    try:
        if is_repository(config):
            kind = f"{kind} of the LLaVA repository, with {tower_name(config)} for its tower"
            config = text_config(config)
        elif kind == "llava":
            llava = describe(config)
            return {"model": kind, "language model": _language(llava.language), "vision tower": _vision(llava.vision)}
        for what, reads, says in KINDS:
            try:
                return {"model": kind, what: says(reads(config))}
            except ValueError:
                continue
    except (ValueError, KeyError) as error:
        return {"model": f"{kind}: {error}"}
    return {"model": f"{kind}, which no table here describes"}


def _language(model: LanguageModel) -> str:
    return (
        f"{model.family.name}, {model.num_parameters / 1e9:.2f} billion parameters: {model.num_layers} layers of "
        f"{model.hidden_size}, {model.num_attention_heads} heads in {model.num_query_groups} groups, feed-forward "
        f"{model.ffn_hidden_size}, vocabulary {model.vocab_size}"
    )


def _vision(model: VisionModel) -> str:
    return (
        f"{model.family.name}: {model.num_layers} layers used, of {model.hidden_size}; images of {model.img_size} "
        f"pixels in patches of {model.patch_dim}, {model.num_image_tokens} tokens each"
    )


KINDS: Sequence[tuple[str, Callable, Callable]] = (
    ("language model", describe_language_model, _language),
    ("vision tower", describe_vision_model, _vision),
)
