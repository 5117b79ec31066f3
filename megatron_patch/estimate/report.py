"""What `--plan true` prints, and the line by which a run says that less parallelism would be faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_patch.config.train import Config, Recompute
from megatron_patch.estimate.cards import CARDS, Card
from megatron_patch.estimate.memory import GIB, memory_report, plan
from megatron_patch.estimate.time import Time, predict
from megatron_patch.families.sizes import Llava, divisors

ROOM = 0.8
"""Part of a GPU's memory that the plan may take: caches, communication's buffers and the CUDA context come on top."""
MICRO_BATCHES = (1, 2, 4, 8)
"""What more would gain is less than the prediction's error."""
ENOUGH = 1.01
"""A smaller micro batch is taken where it takes at most so many times as long."""
WORTH_SAYING = 0.9
"""Part of the time below which a suggestion is made."""


@dataclass(frozen=True)
class Suggestion:
    """Less model parallelism, or a larger micro batch, or nothing recomputed."""

    config: Config
    memory: int
    """Bytes of the rank that needs most."""
    ratio: float
    """Its predicted time / the given settings'."""


def report(config: Config, llava: Llava, world_size: int) -> str:
    """The plan of a run: memory, predicted time, and beside it that of the suggestion, where there is one."""
    card = CARDS["H100"]
    suggestion = suggest(config, llava, world_size, card, card.memory)
    parts = [memory_report(config, llava, world_size), time_report(config, llava, world_size, suggestion)]
    if suggestion is not None:
        parts.append(line(suggestion, card.memory, "an H100's"))
    return "\n".join(parts)


def time_report(config: Config, llava: Llava, world_size: int, suggestion: Suggestion | None) -> str:
    """The predicted time as a table: for each card a line of the settings given, and one of the suggestion."""
    lines = [
        f"predicted time on {world_size} GPU{'s' if world_size > 1 else ''}, samples as long as LLaVA-Pretrain's "
        "(arithmetic, never compared with a GPU; expect an error of a sixth where the GPU bounds it, of a third where "
        "launches or communication do):",
        f"{'settings':<44} {'GPU':>4} {'s/iteration':>11} {'samples/s':>9} {'TFLOP/s/GPU':>11} {'of peak':>7}  "
        "bound by (ms per micro batch)",
    ]
    for given in [config] if suggestion is None else [config, suggestion.config]:
        most = max(memory.total for memory in plan(given, llava, world_size))
        for name in ("H100", "H200"):
            time = predict(given, llava, world_size, CARDS[name])
            fits = "" if most <= CARDS[name].memory else f"; needs more than its {CARDS[name].memory / GIB:.0f} GiB"
            lines.append(
                f"{describe(given):<44} {name:>4} {time.iteration:>11.3g} {time.samples:>9.1f} "
                f"{time.flops / 1e12:>11.3g} {time.share:>7.0%}  {_bound(time)}{fits}"
            )
    return "\n".join(lines)


def suggest(config: Config, llava: Llava, world_size: int, card: Card, memory: int) -> Suggestion | None:
    """The fastest settings with at most as much model parallelism that fit `memory` bytes of a GPU with room.

    None where nothing is predicted to be faster by a tenth.
    """
    given = predict(config, llava, world_size, card).iteration
    fitting = []
    for candidate in _candidates(config, llava, world_size):
        most = max(stage.total for stage in plan(candidate, llava, world_size))
        if most <= ROOM * memory:
            ratio = predict(candidate, llava, world_size, card).iteration / given
            fitting.append(Suggestion(candidate, most, ratio))
    least = min((suggestion.ratio for suggestion in fitting), default=1.0)
    if least > WORTH_SAYING:
        return None
    # Candidates come with the smallest micro batch first.
    return next(suggestion for suggestion in fitting if suggestion.ratio <= ENOUGH * least)


def line(suggestion: Suggestion, memory: int, whose: str) -> str:
    """The suggestion in one line. `whose`: the memory is that GPU's."""
    return (
        f"{describe(suggestion.config)} fits ({suggestion.memory / GIB:.0f} of {whose} {memory / GIB:.0f} GiB) and is "
        f"predicted to take {suggestion.ratio:.2f} of the time; the arguments given are used"
    )


def describe(config: Config) -> str:
    """The settings that a suggestion changes, as the scripts' arguments call them."""
    parallel = config.parallel
    return (
        f"TP {parallel.tensor_model_parallel_size}, PP {parallel.pipeline_model_parallel_size}, "
        f"CP {parallel.context_parallel_size}, "
        f"micro batch {config.data.micro_batch_size}, AC {config.training.recompute}"
    )


def _bound(time: Time) -> str:
    parts = f"kernels {1e3 * time.compute:.0f}, communication {1e3 * time.communication:.0f}"
    return f"{time.bound} ({parts}, launches {1e3 * time.launches:.0f})"


def _candidates(config: Config, llava: Llava, world_size: int) -> Iterator[Config]:
    """Settings with at most as much model parallelism, that can run, the smallest micro batch first."""
    parallel = config.parallel
    sizes = [
        (tp, pp, cp)
        for tp in divisors(parallel.tensor_model_parallel_size)
        for pp in divisors(parallel.pipeline_model_parallel_size)
        for cp in divisors(parallel.context_parallel_size)
    ]
    recomputes: tuple[Recompute, ...] = ("none", config.training.recompute)
    for micro_batch in (1,) if config.data.packs else MICRO_BATCHES:
        for tp, pp, cp in sizes:
            for recompute in dict.fromkeys(recomputes):
                try:
                    candidate = _changed(config, tp, pp, cp, micro_batch, recompute)
                    candidate.check(llava)
                    candidate.data.num_micro_batches(candidate.parallel, world_size)
                except ValueError:
                    continue
                yield candidate


def _changed(config: Config, tp: int, pp: int, cp: int, micro_batch: int, recompute: Recompute) -> Config:
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=config.parallel.virtual_pipeline_model_parallel_size if pp > 1 else 1,
        sequence_parallel=config.parallel.sequence_parallel if tp > 1 else None,
    )
    training = config.training
    if recompute != training.recompute:
        training = replace(training, recompute=recompute, recompute_method=None, recompute_num_layers=None)
    data = replace(config.data, micro_batch_size=micro_batch)
    return replace(config, parallel=parallel, training=training, data=data)
