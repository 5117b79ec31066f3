"""An exported LLaVA's language model and vision tower as the separate models that they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_patch.conversion import companions
from megatron_patch.stores.hf import HfWriter
from megatron_patch.stores.reader import Reader

LANGUAGE_MODEL = "language_model"
VISION_TOWER = "vision_tower"


def write_parts(
    folder: Path,
    weights: Reader,
    config: dict[str, Any],
    tower_class: str,
    dtype: str,
    max_shard_size: int,
) -> None:
    """Write `folder`/language_model and `folder`/vision_tower: weights, config.json, what generates and prepares.

    `weights`: a whole LLaVA under the hub's names, the unused ones included, in `dtype`. `config`: its LlavaConfig,
    whose parts are the sources' own config.json and stay so. `tower_class`: transformers' for the tower alone. The
    tokenizer is the caller's. Raises as the readers do.
    """
    text, tower = config["text_config"], config["vision_config"]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text["model_type"]]
    for name, part, architecture in ((LANGUAGE_MODEL, text, causal), (VISION_TOWER, tower, tower_class)):
        target = folder / name
        target.mkdir()
        companions.write_json(target, companions.CONFIG, _own_config(part, architecture, dtype))
        _write_weights(target, weights, f"{name}.", max_shard_size)
    companions.copy_companions(folder, folder / LANGUAGE_MODEL, (companions.GENERATION_CONFIG,))
    companions.copy_companions(folder, folder / VISION_TOWER, (companions.PREPROCESSOR,))


def _own_config(part: dict[str, Any], architecture: str, dtype: str) -> dict[str, Any]:
    """A part's config.json as its source wrote it, with the type of the weights and a class to load them by."""
    types = {name: dtype for name in ("dtype", "torch_dtype") if name in part}
    return {**part, **types, "architectures": part.get("architectures") or [architecture]}


def _write_weights(folder: Path, weights: Reader, prefix: str, max_shard_size: int) -> None:
    writer = HfWriter(folder, max_shard_size)
    for name in weights:
        if name.startswith(prefix):
            writer.add(name.removeprefix(prefix), weights.view(name))
    writer.close()
