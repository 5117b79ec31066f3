"""Tokens per second of a training step on the same samples: padded to 1,024, padded to the longest, and packed.

    python benchmarks/packing.py [--size 100M] [--samples 6] [--steps 3] [--rounds 1]

A picture of 336 pixels and a caption of LLaVA-Pretrain's length each; only the projector trains. Padding is no token,
and the losses must be equal. Where other work shares the cores, CPU seconds are the steadier figure.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from contest import run_round
from contestants import Ours, transformers_model
from inputs import IGNORE, SIZES, machine, make_batch, make_config, write_description
from timing import Result, release, warm_up

from megatron_patch.config.train import Parallel
from megatron_patch.data.task_encoder import Batch, EncodedSample, pack_samples
from megatron_patch.model import groups

LONGEST = 1024
TOLERANCE = 1e-5


def main() -> int:
    """Print a row per way; 1 when losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="100M", help="of the whole model")
    parser.add_argument("--samples", type=int, default=6, help="of a step")
    parser.add_argument("--steps", type=int, default=3, help="of each round; the first is not measured")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    batches = [make_batch(options.size, options.samples, seed) for seed in range(options.steps)]
    ways = {"padded to 1,024": [pad(batch) for batch in batches], "padded to the longest": batches}
    ways["packed"] = [pack(batch) for batch in batches]
    results = {name: Result() for name in ways}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        write_description(Path(folder), options.size)
        groups.start(Parallel(), seed=1, init_method=f"file://{folder}/store", rank=0, world_size=1)
        config = make_config(Path(folder), True, "fp32", ways["padded to 1,024"])
        data = replace(config.data, micro_batch_size=1, global_batch_size=1, packing_buffer_size=options.samples)
        weights = transformers_model(config)
        for _ in range(options.rounds):
            for name, mine in ways.items():
                contestant = Ours(replace(config, data=data) if name == "packed" else config, weights)
                warm_up(contestant, [[batch] for batch in mine])
                run_round(contestant, mine, results[name])
                del contestant
                release()
        groups.stop()
    print(f"{options.size}, the projector trains, fp32: {machine()}; load average {os.getloadavg()[0]:.1f}")
    tokens = statistics.mean(sum(lengths(batch)) for batch in batches[1:])
    print(
        f"| {tokens:.0f} tokens a step | positions | s/step | tokens/s | CPU s/step | ratio | losses |\n"
        + "|---" * 7
        + "|"
    )
    first = next(iter(results.values()))
    for name, result in results.items():
        seconds, cpu = statistics.median(result.seconds), statistics.median(result.cpu_seconds)
        ratio = statistics.median(first.cpu_seconds) / cpu
        losses = " ".join(f"{loss:.6f}" for loss in result.losses)
        positions = ways[name][-1].input_ids.numel()
        print(f"| {name} | {positions} | {seconds:.2f} | {tokens / seconds:.0f} | {cpu:.2f} | {ratio:.2f} | {losses} |")
    pairs = (zip(result.losses, first.losses, strict=True) for result in results.values())
    return int(max(abs(loss - other) for pair in pairs for loss, other in pair) > TOLERANCE)


def lengths(batch: Batch) -> list[int]:
    """Positions of each sample up to its last label."""
    return [int((labels != IGNORE).nonzero()[-1]) + 1 for labels in batch.labels]


def pad(batch: Batch) -> Batch:
    """Every row filled up to 1,024."""
    missing = (0, LONGEST - batch.input_ids.shape[1])
    return replace(batch, input_ids=F.pad(batch.input_ids, missing), labels=F.pad(batch.labels, missing, value=IGNORE))


def pack(batch: Batch) -> Batch:
    """All rows in one, as the loader packs them."""
    rows = zip(batch.keys, batch.input_ids, batch.labels, batch.pixels, lengths(batch), strict=True)
    samples = [
        EncodedSample(
            __key__=key,
            __restore_key__=(),
            input_ids=ids[:length],
            labels=labels[:length],
            pixels=pixels[None],
            num_truncated=0,
        )
        for key, ids, labels, pixels, length in rows
    ]
    return pack_samples(samples, multiple=1)


if __name__ == "__main__":
    sys.exit(main())
