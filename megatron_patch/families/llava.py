"""LLaVA: a language model, a vision tower and a projector, each with its own table, under their prefixes.

`config.json` of a LLaVA folder is the one place that sizes are read from (`hf_config.py` says how).
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.families.hf_config import describe
from megatron_patch.families.projector import PROJECTOR
from megatron_patch.families.shapes import hf_shapes, language_dims, projector_dims, vision_dims
from megatron_patch.families.sizes import Llava
from megatron_patch.families.table import Family, Weight
from megatron_patch.files.json_object import read_json
from megatron_patch.files.names import CONFIG

# A tied model has no output layer of its own. The last of several pipeline stages holds a copy of the embedding under
# that name; on a single stage, and in torch_dist, there is none.
EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT_LAYER = "language_model.output_layer.weight"

# The names that transformers' modules have since 4.52, turned into the hub's.
RENAMED = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(?=vision_tower\.|multi_modal_projector\.)", ""),
)


@dataclass(frozen=True)
class Part:
    """One of the three models and what precedes its tensors' names on either side (Hugging Face: the hub's names)."""

    family: Family
    weights: tuple[Weight, ...]
    """The family's table, or what of it this model has."""
    num_layers: int
    mcore_prefix: str
    hf_prefix: str
    dims: dict[str, int]
    """Sizes, in the names of `shapes.py`."""
    num_unused_layers: int = 0
    """The checkpoint's layers after these."""

    def rows(self) -> Iterator[Weight]:
        """This part's table, prefixed and sized, every layer written out."""
        for weight in self.weights:
            layers = [weight.at(layer) for layer in range(self.num_layers)] if "*" in weight.mcore else [weight]
            for layer in layers:
                yield layer.prefixed(self.mcore_prefix, self.hf_prefix).sized(self.dims)

    def matrices(self, name: str) -> dict[str, int]:
        """Elements of the matrices whose names in the table hold `name`; of one layer, where each layer has one."""
        shapes = {weight.mcore: weight.sized(self.dims).shape for weight in self.weights if name in weight.mcore}
        return {mcore: math.prod(shape) for mcore, shape in shapes.items() if len(shape) > 1}

    def unused_shapes(self, present: Container[str]) -> dict[str, tuple[int, ...]]:
        """The hub's names and shapes of the tensors that the network does not use: its last layers', and what the table
        says; what is optional if any of it is `present`.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        repeated = [weight.sized(self.dims) for weight in self.weights if "*" in weight.mcore]
        for layer in range(self.num_layers, self.num_layers + self.num_unused_layers):
            for weight in (weight.at(layer) for weight in repeated):
                shapes |= zip(weight.hf, hf_shapes(weight), strict=True)
        optional = self.family.optional
        has_optional = any(self.hf_prefix + name in present for name, _ in optional)
        for name, axes in (*self.family.unused, *(optional if has_optional else ())):
            shapes[name] = tuple(self.dims[axis] for axis in axes)
        return {self.hf_prefix + name: shape for name, shape in shapes.items()}

    def hub_name(self, hf_name: str) -> str | None:
        """The hub's name of a tensor in this part's own checkpoint (not a LLaVA's); None: left out on purpose."""
        name = self.family.canonical(hf_name)
        return None if self.family.is_ignored(name) else self.hf_prefix + name


def parts(llava: Llava) -> tuple[Part, Part, Part]:
    """Language model, vision tower, projector."""
    language, vision = llava.language, llava.vision
    return (
        Part(
            family=language.family,
            weights=language.weights,
            num_layers=language.num_layers,
            mcore_prefix="language_model.",
            hf_prefix="language_model.",
            dims=language_dims(language),
        ),
        Part(
            family=vision.family,
            weights=vision.family.weights,
            num_layers=vision.num_layers,
            num_unused_layers=vision.num_unused_layers,
            mcore_prefix="vision_model.",
            hf_prefix="vision_tower.",
            dims=vision_dims(vision),
        ),
        Part(
            family=PROJECTOR,
            weights=PROJECTOR.weights,
            num_layers=0,
            mcore_prefix="vision_projection.",
            hf_prefix="multi_modal_projector.",
            dims=projector_dims(language, vision),
        ),
    )


def rows(llava: Llava) -> list[Weight]:
    """The whole model's table, sized."""
    return [weight for part in parts(llava) for weight in part.rows()]


def unused_shapes(llava: Llava, present: Container[str]) -> dict[str, tuple[int, ...]]:
    """The hub's names and shapes of all tensors that the network does not use: the tower's, after LLaVA's layer.

    `present`: names in the checkpoint, since not every one has all of them.
    """
    return {name: shape for part in parts(llava) for name, shape in part.unused_shapes(present).items()}


def pipeline_copies(llava: Llava) -> dict[str, str]:
    """megatron.core's tensors that the last of several pipeline stages holds a second time: copy -> original."""
    return {OUTPUT_LAYER: EMBEDDING} if llava.language.share_embeddings_and_output_weights else {}


def hub_name(llava: Llava, hf_name: str) -> str | None:
    """The hub's name of a tensor in a whole LLaVA's checkpoint, whatever wrote it; None: left out on purpose."""
    for pattern, replacement in RENAMED:
        hf_name = re.sub(pattern, replacement, hf_name)
    for part in parts(llava):
        if hf_name.startswith(part.hf_prefix):
            return part.hub_name(hf_name.removeprefix(part.hf_prefix))
    return hf_name


def read_config(folder: Path) -> Llava:
    """Sizes of the LLaVA that `folder`/config.json describes. Raises ValueError or OSError that names the file."""
    path = Path(folder) / CONFIG
    config = read_json(path, "a folder made by hf2mcore_convertor_llava.sh or a LLaVA from Hugging Face")
    try:
        return describe(config)
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}, which a LLaVA's config.json holds") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
