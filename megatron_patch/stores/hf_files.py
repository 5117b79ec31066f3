"""Which files of a Hugging Face folder are the model: what transformers loads when it is given the folder. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_patch.files.json_object import read_json
from megatron_patch.files.names import CONFIG

ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them (`_get_resolved_checkpoint_files`): the first one is the model."""

EXPLICIT = "transformers_weights"
"""config.json's name of another file that is the model."""

WEIGHTS = r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|ckpt)(\.index(\..+)?\.json)?"
ADAPTER = r"adapter_config\.json|adapter_model.*\.(safetensors|bin|pt|json)|non_lora_trainables\.bin"
MERGE = "merge it with peft (merge_and_unload, then save_pretrained) and give the folder of that"
LFS = b"version https://git-lfs.github.com/"


def weight_file(folder: Path) -> Path:
    """The file of weights, or the index of several, that is the model of `folder`.

    Raises FileNotFoundError, one line that names what is there instead, or ValueError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a Hugging Face checkpoint")
    explicit = read_json(folder / CONFIG).get(EXPLICIT) if (folder / CONFIG).is_file() else None
    if explicit is not None:
        return _explicit_file(folder, explicit)
    for name in ORDER:
        path = folder / name
        if path.is_file():
            return path
        if path.is_symlink():
            raise FileNotFoundError(f"{path}: leads to {os.readlink(path)}, which is missing; download it again")
    others = sorted(path.name for path in folder.iterdir() if re.fullmatch(WEIGHTS, path.name))
    found = f"; {', '.join(others[:3])} is no name that transformers loads" if others else ""
    what = ", as of a variant: rename it or save the model again" if any(map(_is_variant, others)) else ""
    raise FileNotFoundError(f"{folder}: holds no weights; expected one of {', '.join(ORDER)}{found}{what}")


def passed_over(folder: Path) -> list[str]:
    """Names of other whole models in `folder`, which `weight_file` comes before: transformers does not read them."""
    chosen = weight_file(folder).name
    return [name for name in ORDER if name != chosen and (Path(folder) / name).is_file()]


def check_indices(folder: Path) -> None:
    """Raise ValueError, one line that names the file, for an index that is no json, also one that is passed over."""
    for name in ORDER:
        if name.endswith(".json") and (Path(folder) / name).is_file():
            read_json(Path(folder) / name)


def refuse_adapter(folder: Path) -> None:
    """Raise ValueError, which says what to do, where a LoRA adapter lies in `folder`: peft would add it to the model.

    Adapters in folders below are none of the model's.
    """
    folder = Path(folder)
    found = sorted(path for path in folder.glob("*") if re.fullmatch(ADAPTER, path.name))
    if not found:
        return
    if any((folder / name).is_file() for name in ORDER):
        raise ValueError(
            f"{found[0]}: is of a LoRA adapter beside the model, which would be left out; {MERGE}, or move the "
            "adapter's files away"
        )
    raise ValueError(f"{found[0]}: is of a LoRA adapter{_base(folder)}, and no whole model is here; {MERGE}")


def is_lfs_pointer(path: Path) -> bool:
    """Whether a clone without Git LFS left a few lines in the place of a file."""
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def _base(folder: Path) -> str:
    try:
        name = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    except (ValueError, OSError):
        return ""
    return f" for {name!r}"[:200] if isinstance(name, str) else ""


def _explicit_file(folder: Path, name: object) -> Path:
    whole = isinstance(name, str) and re.fullmatch(r"[^/\\\0]+\.safetensors(\.index\.json)?", name)
    if not whole or not (folder / name).is_file():
        raise ValueError(
            f"{folder / CONFIG}: {EXPLICIT} is {str(name)[:80]!r}; expected a safetensors file, or an index of some, "
            "in this folder"
        )
    return folder / name


def _is_variant(name: str) -> bool:
    return bool(re.fullmatch(r"(model|pytorch_model)\.(.+\.)?(safetensors|bin)(\.index\..+\.json)?", name))
