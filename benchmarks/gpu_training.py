"""Phases of the check that train: both stages of LLaVA, packing, and the same on Transformer Engine's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from contestants import Contestant, Ours, Transformers, transformers_model
from inputs import SIZES, Batch, make_batch, make_config
from packing import pack
from rows import read
from timing import Memory, Result, allocated_bytes, measure, release
from toggles import STAGE1, STAGE2, TRANSFORMER_ENGINE, Absent, Toggle
from work import TOLERANCE, figures, largest_difference

from megatron_patch.config.train import Config
from megatron_patch.estimate.memory import plan
from megatron_patch.families.llava import read_config

if TYPE_CHECKING:
    from gpu import Run

NUM_BATCHES = 3
SHARE_OF_LAYERS = 4
"""Stage 2 takes a quarter of the layers, whose states fit one GPU."""


class Table:
    """Rows of one phase: measured, compared with the first losses of the same samples, written."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.expected: dict[int, list[float]] = {}
        self.memories: dict[int, Memory] = {}

    def add(
        self, name: str, contestant: Contestant, config: Config, batches: list[Batch], micro_batches: int = 1
    ) -> Result:
        """Measure a row. Losses are compared with those of the first row of as many samples in a step."""
        memory = self.memories.setdefault(id(contestant), Memory())
        steps = [[batch] * micro_batches for batch in batches]
        result = measure(contestant, steps, self.run.steps, memory)
        label = f"{name}, {config.data.micro_batch_size}" + (f" x {micro_batches}" if micro_batches > 1 else "")
        if result.problem:
            self.run.rows.add(label, problem=result.problem)
            return result
        found = figures(name.partition(",")[0], config, batches, result, micro_batches)
        expected = self.expected.setdefault(len(batches[0].keys), result.losses)
        difference = largest_difference([expected, result.losses])
        found |= {"loss": result.losses[-1], "loss_difference": difference}
        agree = difference <= TOLERANCE[config.model.precision]
        problem = "" if agree else f"losses differ by {difference:.1e}"
        self.run.rows.add(label, problem, failed=not agree, **found)
        return result

    def add_toggles(self, toggles: dict[str, Toggle], ours: Ours, batches: list[Batch]) -> None:
        """The row of ours again, with each of these."""
        for name, toggle in toggles.items():
            try:
                with toggle(ours):
                    self.add(f"ours, {name}", ours, ours.config, batches)
            except Absent as absent:
                self.run.rows.add(f"ours, {name}", problem=f"not run: {absent}")

    def build(self, kind: type[Contestant], config: Config, *arguments: object, **options: object) -> Contestant:
        """A contestant, and what it holds on the GPU."""
        memory = Memory()
        with memory.watch():
            contestant = kind(config, *arguments, **options)
        self.memories[id(contestant)] = memory
        return contestant


def padded_batches(run: Run, micro_batch_size: int) -> list[Batch]:
    """Three of one length: the next multiple of 64 that every sample fits in."""
    return [make_batch(run.size, micro_batch_size, seed, SIZES[run.size].longest) for seed in range(NUM_BATCHES)]


def resize(config: Config, micro_batch_size: int, micro_batches: int = 1, **changed: int) -> Config:
    """The same settings with another micro batch."""
    sizes = {"micro_batch_size": micro_batch_size, "global_batch_size": micro_batch_size * micro_batches, **changed}
    return replace(config, data=replace(config.data, **sizes))


def stage1(run: Run) -> None:
    """The projector trains: transformers and ours at several micro batches, and ours without each optimisation."""
    run.start()
    table, (first, *others) = Table(run), run.micro_batch_sizes
    batches = {size: padded_batches(run, size) for size in run.micro_batch_sizes}
    config = make_config(run.description("whole"), True, run.precision, batches[first], transformer_impl="local")
    theirs = table.build(Transformers, config)
    table.add("transformers", theirs, config, batches[first])
    theirs.reset()  # to the weights that it began with
    ours = table.build(Ours, config, theirs.model)
    table.add("ours", ours, ours.config, batches[first])
    for size in others:
        if size <= 8:
            table.add("transformers", theirs, resize(config, size), batches[size])
    del theirs
    release()
    for size in others:
        ours.take(resize(config, size).data)
        table.add("ours", ours, ours.config, batches[size])
    ours.take(config.data)
    table.add(
        "ours, lengths as they come", ours, ours.config, [make_batch(run.size, first, n) for n in range(NUM_BATCHES)]
    )
    table.add_toggles(STAGE1, ours, batches[first])


def packing(run: Run) -> None:
    """Six samples in one sequence, and as six rows."""
    run.start()
    add_packing(run, Table(run), "ours", "local", padded_batches(run, 6))


def add_packing(run: Run, table: Table, name: str, impl: str, batches: list[Batch]) -> None:
    """Two rows of the same samples, padded and packed."""
    packed = [pack(batch) for batch in batches]
    longest = max(packed, key=lambda batch: batch.labels.shape[1])
    config = make_config(run.description("whole"), True, run.precision, [longest], transformer_impl=impl)
    ours = table.build(Ours, config)
    ours.take(resize(config, len(batches[0].keys)).data)
    table.add(f"{name}, padded", ours, ours.config, batches)
    ours.take(resize(config, 1, packing_buffer_size=len(batches[0].keys)).data)
    table.expected[1] = table.expected[len(batches[0].keys)]
    table.add(f"{name}, packed", ours, ours.config, packed)


def stage2(run: Run) -> None:
    """Language model and projector train, a quarter of the layers, two micro batch sizes; all layers where they fit."""
    run.start()
    table, (first, second) = Table(run), (2, 4)
    batches = {size: padded_batches(run, size) for size in (first, second)}
    layers = max(1, SIZES[run.size].language[2] // SHARE_OF_LAYERS)
    folder = run.description("quarter", layers)
    config = make_config(folder, False, run.precision, batches[first], freeze_vit=True, transformer_impl="local")
    theirs = table.build(Transformers, config)
    table.add("transformers", theirs, config, batches[first])
    theirs.reset()  # to the weights that it began with, and without the optimizer's states
    ours = table.build(Ours, config, theirs.model)
    del theirs
    release()
    table.add("ours", ours, ours.config, batches[first])
    ours.take(resize(config, first, micro_batches=4).data)
    table.add("ours", ours, ours.config, batches[first], micro_batches=4)
    ours.take(config.data)
    table.add_toggles(STAGE2, ours, batches[first])
    ours.take(resize(config, second).data)
    table.add("ours", ours, ours.config, batches[second])
    del ours
    release()
    add_all_layers(run, table)


def add_all_layers(run: Run, table: Table) -> None:
    """The whole model at micro batch 1, where a GPU has room for its states."""
    row = "ours, all layers"
    if not run.has_gpu:
        run.rows.add(f"{row}, 1", problem="not run: needs a GPU")
        return
    batches = padded_batches(run, 1)
    whole = run.description("whole")
    config = make_config(whole, False, run.precision, batches, freeze_vit=True, transformer_impl="local")
    planned = plan(config, read_config(whole), world_size=1)[0].total
    free = torch.cuda.get_device_properties(0).total_memory - allocated_bytes()
    if planned > free:
        why = f"not run: the plan asks for {planned / 1e9:.1f} GB, and the GPU has {free / 1e9:.1f}"
        run.rows.add(f"{row}, 1", problem=why)
        return
    table.expected.pop(1, None)  # other weights
    ours = table.build(Ours, config, keep_start=False)
    table.add(row, ours, ours.config, batches)


def engine(run: Run) -> None:
    """Stage 1 and packing on Transformer Engine's layers: as they are, with each fusion flipped, and in fp8."""
    from gpu_commands import add_tests

    try:
        pass
    except Exception as error:
        run.rows.add("Transformer Engine", problem=f"could not be loaded: {type(error).__name__}: {error}")
        return
    add_tests(run, "tests with Transformer Engine", ["tests/gpu", "-k", "transformer_engine"], run.limit / 2)
    run.start()
    first, table = run.micro_batch_sizes[0], Table(run)
    batches = padded_batches(run, first)
    # What transformers lost on the same samples, where that phase ran.
    losses = {row["row"]: row["losses"] for row in read(run.rows.path) if "losses" in row and row["phase"] == "stage1"}
    if f"transformers, {first}" in losses:
        table.expected[first] = losses[f"transformers, {first}"]
    settings = {"transformer_impl": "transformer_engine"}
    config = make_config(run.description("whole"), True, "bf16", batches, **settings)
    weights = transformers_model(config)
    for precision in ("bf16", "fp8"):
        config = make_config(run.description("whole"), True, precision, batches, **settings)
        ours = table.build(Ours, config, weights)
        table.add(f"ours, Transformer Engine, {precision}", ours, ours.config, batches)
        if precision == "bf16":
            table.add_toggles(TRANSFORMER_ENGINE, ours, batches)
        del ours
        release()
    del weights
    release()
    add_packing(run, Table(run), "ours, Transformer Engine", "transformer_engine", padded_batches(run, 6))
