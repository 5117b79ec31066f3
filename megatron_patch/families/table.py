"""The vocabulary of the tables: what a model is, and how a tensor or a setting of it is called on each side.

A table is data. Nothing here touches a tensor: `layout.py` reads the same rows and moves the bytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_patch.families.shapes import whole_shape

MAX_LAYERS = 4096
"""Thirty times the deepest model there is: a table of rows is made of it before a weight is looked at."""

MAX_SIZE = 2**31 - 1
MAX_NUMBER = 1e30
NUM_LAYERS = "num_hidden_layers"
Layout = Literal["same", "qkv", "gated", "vocab", "class_token"]
Norm = Literal["RMSNorm", "LayerNorm"]
Activation = Literal["silu", "quick_gelu", "gelu_tanh", "gelu"]
Strategy = Literal["default", "full"]
"""LLaVA's vision_feature_select_strategy: all positions of the tower without the first, or all."""


@dataclass(frozen=True)
class Weight:
    """One megatron.core tensor and the Hugging Face tensors that it is made of. `*` stands for a layer's index."""

    mcore: str
    hf: tuple[str, ...]
    layout: Layout = "same"
    axis: int | None = None
    """Tensor-parallel axis; None: every rank holds the whole tensor."""

    shape: tuple[int, ...] = ()
    """megatron.core's whole tensor, vocabulary not padded. Known once the row belongs to a model (`Part.rows`)."""

    num_query_groups: int = 1
    kv_channels: int = 1
    """How a `qkv` row is interleaved; known together with the shape."""

    def at(self, layer: int) -> Weight:
        """The row of one layer: `*` replaced by its index."""
        return replace(
            self, mcore=self.mcore.replace("*", str(layer)), hf=tuple(n.replace("*", str(layer)) for n in self.hf)
        )

    def prefixed(self, mcore: str, hf: str) -> Weight:
        """The row inside a larger model, where both names carry a prefix."""
        return replace(self, mcore=mcore + self.mcore, hf=tuple(hf + name for name in self.hf))

    def sized(self, dims: dict[str, int]) -> Weight:
        """The row in a model of these sizes (`shapes.py` has their names): shape and interleaving filled in."""
        shape = whole_shape(self.mcore, self.layout, dims)
        return replace(self, shape=shape, num_query_groups=dims["groups"], kv_channels=dims["kv_channels"])


def replicated(mcore: str, hf: str) -> Weight:
    """The same tensor on both sides, whole on every rank."""
    return Weight(mcore, (hf,))


def column(mcore: str, hf: str) -> Weight:
    """A ColumnParallelLinear's weight or bias: sharded along the output channels."""
    return Weight(mcore, (hf,), axis=0)


def row(mcore: str, hf: str) -> Weight:
    """A RowParallelLinear's weight: sharded along the input channels. (Its bias is replicated.)"""
    return Weight(mcore, (hf,), axis=1)


def vocab(mcore: str, hf: str) -> Weight:
    """An embedding or output layer: rows padded to the shared rule, then sharded along them."""
    return Weight(mcore, (hf,), layout="vocab", axis=0)


def qkv(mcore: str, attention: str, parameter: str = "weight") -> Weight:
    """Query, key and value of an attention module, interleaved per query group in megatron.core."""
    names = tuple(f"{attention}.{projection}_proj.{parameter}" for projection in "qkv")
    return Weight(mcore, names, layout="qkv", axis=0)


def gated(mcore: str, gate: str, up: str) -> Weight:
    """A gated feed-forward's first layer: [gate; up], and shard i is [gate_i; up_i]."""
    return Weight(mcore, (gate, up), layout="gated", axis=0)


@dataclass(frozen=True)
class Setting:
    """One size in megatron.core's name, Hugging Face's, and what Hugging Face means by leaving it out."""

    mcore: str
    hf: str
    default: Any
    """Its type is the setting's; None: a whole number."""

    optional: bool = False
    """Whether null stands for something."""

    def read(self, hf_config: dict[str, Any]) -> Any:
        """The setting in a config.json. Raises ValueError, which names it, for a value of another type."""
        value = hf_config.get(self.hf, self.default)
        if value is None and (self.optional or self.default is None):
            return None
        return checked(self.hf, value, int if self.default is None else type(self.default))


def checked(name: str, value: Any, kind: type) -> Any:
    """`value` of config.json, if it is of that kind: bool, dict, or a number above 0. Else ValueError."""
    expected = {bool: "true or false", dict: "an object", int: "a whole number above 0", float: "a number above 0"}[
        kind
    ]
    types = (int, float) if kind is float else kind
    is_number = kind in (int, float)
    # Python's json reads NaN and Infinity too, which are no numbers of a model.
    fits = isinstance(value, types) and not (is_number and (isinstance(value, bool) or not 0 < value < math.inf))
    if not fits:
        raise ValueError(f"{name} is {short(value)}; expected {expected}")
    limit = MAX_LAYERS if name == NUM_LAYERS else MAX_SIZE
    largest = limit if kind is int else MAX_NUMBER
    if is_number and value > largest:
        raise ValueError(f"{name} is {short(value)}; expected {expected}, at most {largest:,}")
    return value


def short(value: Any) -> str:
    """A value of a config.json for a message, which stays one line of readable length."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**50 else "a number of over 50 digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


@dataclass(frozen=True, kw_only=True, repr=False)
class Family:
    """What a kind of model is: its tensors, its settings, and the network that follows from neither."""

    name: str
    """Hugging Face's `model_type`."""

    weights: tuple[Weight, ...]
    activation: Activation
    norm: Norm | None = None
    """None: it has no norm of its own."""
    settings: tuple[Setting, ...] = ()
    required: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Settings of config.json that the network takes as given, with the values that mean so, the default first."""

    ignored: tuple[str, ...] = ()
    """Patterns of Hugging Face names that a checkpoint may hold and that carry nothing to convert."""

    unused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Hugging Face's tensors that the network does not use, besides its last layers': names, and of their dimensions
    (`shapes.py`). Carried over to the export."""

    optional: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """The same of what not every checkpoint has: all of it or nothing."""

    renamed: tuple[tuple[str, str], ...] = ()
    """(pattern, replacement): other spellings of the same Hugging Face names, turned into the table's."""

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def has(self, name: str) -> bool:
        """Whether there is a tensor whose megatron.core name ends so."""
        return any(weight.mcore.endswith(name) for weight in self.weights)

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward's first layer is a gate and what it lets pass."""
        return any(weight.layout == "gated" for weight in self.weights)

    def canonical(self, hf_name: str) -> str:
        """A Hugging Face name in the table's spelling."""
        for pattern, replacement in self.renamed:
            hf_name = re.sub(pattern, replacement, hf_name)
        return hf_name

    def is_ignored(self, hf_name: str) -> bool:
        """Whether a tensor of this (canonical) name is left out on purpose."""
        return any(re.fullmatch(pattern, hf_name) for pattern in self.ignored)

    def read_settings(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        """Sizes in megatron.core's names. Raises ValueError for a setting that megatron.core's model does not have."""
        for name, allowed in self.required:
            given = hf_config.get(name, allowed[0])
            if given not in allowed:
                raise ValueError(
                    f"{name} is {short(given)}; for {self.name} only {', '.join(map(repr, allowed))} is supported"
                )
        return {setting.mcore: setting.read(hf_config) for setting in self.settings}


@dataclass(frozen=True, kw_only=True, repr=False)
class LanguageFamily(Family):
    """What a kind of language model is."""

    prompt_format: str
    """What `auto` means where the checkpoint has no chat template and no mark of another kind."""


@dataclass(frozen=True, kw_only=True, repr=False)
class VisionFamily(Family):
    """What a kind of vision tower is, also to transformers and to LLaVA."""

    hf_class: str
    """The class that loads it by itself."""

    whole_model: str
    """`model_type` of the model whose vision half it is."""

    feature_layer: int
    """The hidden states that a new LLaVA takes: -2 is the second last layer's output."""

    select_strategy: Strategy

    image_processor: str
    """The class of its image processor."""

    image_settings: dict[str, Any] = field(compare=False)
    """What that class means by leaving a setting out. `image_size` of the tower takes the place of sizes."""
