"""Which layers lie on which pipeline stage: equal or longer and shorter ones, virtual ones. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_patch.families.sizes import divisors, listing

LANGUAGE_LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)(\..*)")


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the language model's layers is on the first stage, and not on the last."""
    return not name.startswith("language_model.") or name.startswith("language_model.embedding.")


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage (or one virtual stage of it) holds of the language model."""

    layers: range
    """Its layers, by their index in the whole model. Within the stage they count from 0."""

    pre_process: bool
    """Whether it holds the embedding, the vision tower and the projector."""

    post_process: bool
    """Whether it holds the final norm and the output layer."""

    def local_name(self, name: str) -> str | None:
        """A tensor's name within this stage; None when it lies in another one."""
        match = LANGUAGE_LAYER.fullmatch(name)
        if match:
            layer = int(match[2])
            return f"{match[1]}{layer - self.layers.start}{match[3]}" if layer in self.layers else None
        return name if (self.pre_process if is_before_layers(name) else self.post_process) else None


def stage_lengths(num_layers: int, pp_size: int, first: int | None = None, last: int | None = None) -> list[int]:
    """Layers of each pipeline stage. `first`, `last`: of the stages at the ends; the others share the rest equally.

    As megatron.core's num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage. Raises ValueError when
    that leaves the others nothing, or what they cannot share.
    """
    ends = [length for length in (first, last) if length is not None]
    rest, others = num_layers - sum(ends), pp_size - len(ends)
    if min([1, *ends]) < 1 or others < 0 or rest < others or (rest % others if others else rest):
        if not ends:
            raise ValueError(f"{num_layers} layers: not a multiple of {pp_size} pipeline stages")
        given = {"--decoder-first-pipeline-num-layers": first, "--decoder-last-pipeline-num-layers": last}
        flags = " and ".join(f"{flag} {length}" for flag, length in given.items() if length is not None)
        raise ValueError(
            f"{flags}: of {num_layers} layers {rest} are left for {others} of {pp_size} pipeline stages; give numbers "
            "that leave each of these the same"
        )
    middle = [rest // others] * others if others else []
    return [*([] if first is None else [first]), *middle, *([] if last is None else [last])]


def pipeline_stages(lengths: Sequence[int], num_chunks: int = 1) -> list[list[Stage]]:
    """Each pipeline rank's stages: one, or with the interleaved schedule `num_chunks` virtual ones.

    `lengths`: layers of each rank. Virtual stages take turns: the first of every rank, then the second of every rank.
    Raises ValueError when a rank's layers cannot be divided so.
    """
    for length in lengths:
        if length % num_chunks:
            raise ValueError(
                f"--virtual-pipeline-model-parallel-size {num_chunks}: a stage has {length} layers, which {num_chunks} "
                f"does not divide; use {listing(divisors(length))}"
            )
    stages: list[list[Stage]] = [[] for _ in lengths]
    start = 0
    last = (num_chunks - 1, len(lengths) - 1)
    for chunk in range(num_chunks):
        for rank, length in enumerate(lengths):
            layers = range(start, start + length // num_chunks)
            stages[rank].append(Stage(layers, (chunk, rank) == (0, 0), (chunk, rank) == last))
            start = layers.stop
    return stages
