"""The contest of benchmarks/train.py: training steps of ours, and of a plain PyTorch loop over transformers' LLaVA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from contestants import Contestant, Ours, Transformers
from inputs import Batch
from timing import Memory, Result, out_of_memory_told, release, timed, warm_up

from megatron_patch.config.train import Config, Parallel
from megatron_patch.estimate.memory import plan
from megatron_patch.families.llava import read_config
from megatron_patch.model import groups


def contest(config: Config, batches: list[Batch], rounds: int) -> dict[str, Result]:
    """Let each contestant take a step on every batch, and all again in the next round, from the same weights.

    `config`: as `make_config` gives it. Before the first round each warms up over all batches. The first step of a
    round is not measured.
    """
    groups.start(Parallel(), seed=1, init_method=f"file://{config.model.description}/store", rank=0, world_size=1)
    results: dict[str, Result] = {}
    contestants: dict[str, tuple[Contestant, Memory]] = {}
    steps = [[batch] for batch in batches]
    for name, build in builders(config, contestants).items():
        memory, result = Memory(), results.setdefault(name, Result(problem=what_does_not_fit(config)))
        if not result.problem and name != "transformers" and "transformers" not in contestants:
            result.problem = "not run: its weights were to be those of transformers"
        if result.problem:
            continue
        with out_of_memory_told(result), memory.watch():
            contestants[name] = build(), memory
    for name, (contestant, memory) in contestants.items():
        with out_of_memory_told(results[name]), memory.watch():
            warm_up(contestant, steps)
    for _ in range(rounds):
        for name, (contestant, memory) in contestants.items():
            if not results[name].problem:
                with out_of_memory_told(results[name]), memory.watch(results[name]):
                    run_round(contestant, batches, results[name])
    for name, (contestant, _) in contestants.items():
        results[name].peak_bytes = max(0, results[name].peak_bytes - contestant.kept_bytes)
    contestants.clear()
    release()
    groups.stop()
    return results


def builders(config: Config, built: dict[str, tuple[Contestant, Memory]]) -> dict[str, Callable[[], Contestant]]:
    """What makes each contestant; ours take their weights from `built`'s transformers."""
    unfused = replace(config, model=replace(config.model, use_flash_attn=False))
    return {
        "transformers": lambda: Transformers(config),
        "ours": lambda: Ours(config, built["transformers"][0].model),
        "ours, unfused attention": lambda: Ours(unfused, built["transformers"][0].model),
    }


def what_does_not_fit(config: Config) -> str:
    """Why a GPU has too little memory for the step, by the plan; "" where it has enough, or there is no GPU."""
    if not torch.cuda.is_available():
        return ""
    planned = plan(config, read_config(config.model.description), world_size=1)[0].total
    there = torch.cuda.get_device_properties(0).total_memory
    if planned <= there:
        return ""
    return f"does not fit: the plan asks for {planned / 1e9:.1f} GB, and the GPU has {there / 1e9:.1f}"


def run_round(contestant: Contestant, batches: list[Batch], result: Result) -> None:
    """Take the steps of one round and record them."""
    contestant.reset()
    result.losses = []
    for index, batch in enumerate(batches):
        with timed(result if index > 0 else Result()):
            loss = contestant.step(batch)
        result.losses.append(loss)
