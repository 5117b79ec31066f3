"""What a run shows: a line for people, scalars for TensorBoard, a line of JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import textwrap
import time
from datetime import timedelta
from pathlib import Path
from typing import IO

import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_patch.config.train import Config
from megatron_patch.estimate.flops import megatron_lm_flops, step_flops
from megatron_patch.families.sizes import Llava
from megatron_patch.files.text import printable
from megatron_patch.training.captions import Caption
from megatron_patch.training.log import logger
from megatron_patch.training.step import Step, Totals

TAIL = 64 * 1024
"""Bytes that are read at once to find the end of a file's last line."""
LONG_WAIT = 0.05
"""Part of an iteration that may be spent waiting for data; more is said in the log line."""


class Metrics:
    """Rank 0's log and TensorBoard; on other ranks it does nothing.

    Scalars carry Megatron-LM's names where it has them. `first_iteration` is the first that this process computes:
    points that a killed run wrote at or after it are dropped, so that a resumed curve has no double points. (So there
    are no curves `vs samples`: those would be dropped by a number of samples.)
    """

    def __init__(self, config: Config, llava: Llava, *, first_iteration: int, world_size: int, is_writer: bool) -> None:
        self.config = config
        self.llava = llava
        self.world_size = world_size
        self.is_writer = is_writer
        self.steps: list[Step] = []
        self.first_iteration = first_iteration
        self.start = time.monotonic()
        self.shown: set[str] = set()  # keys of images
        if is_writer:
            self.lines = _open_lines(config.checkpoint.output / "log" / "metrics.jsonl")
            self.board = SummaryWriter(config.checkpoint.output / "tensorboard", purge_step=first_iteration)
            settings = json.dumps(dataclasses.asdict(config), default=str, indent=2)
            self.board.add_text("config", f"```json\n{settings}\n```", first_iteration)

    def log(self, iteration: int, step: Step, learning_rate: float, consumed_samples: int) -> None:
        """Record an iteration (counted from 1) and, at the end of an interval, print its line."""
        if not self.is_writer:
            return
        totals = step.totals
        values = {
            "lm loss": totals.loss,
            "learning-rate": learning_rate,
            "loss-scale": step.loss_scale,
            "params-norm": step.params_norm,
            "batch-size": totals.num_samples,
            "iteration-time": step.seconds,
            "batch-generator-time": totals.data_seconds,
            "data-wait-percent": 100 * totals.data_seconds / step.seconds,
            "throughput": self._tflops_per_second([step]),
            "throughput-megatron-lm": megatron_lm_flops(self.llava, totals) / step.seconds / self.world_size / 1e12,
            "samples-per-second": totals.num_samples / step.seconds,
            "tokens-per-second": totals.num_tokens / step.seconds,
            "cut-samples": totals.num_truncated,
            "consumed-samples": consumed_samples,
            **memory(),
        }
        if step.grad_norm is not None:
            values["grad-norm"] = step.grad_norm
        self._record(iteration, values)
        self.steps.append(step)
        last = self.config.training.train_iters
        if iteration % self.config.training.log_interval == 0 or iteration == last:
            logger.info(self._line(iteration, learning_rate))
            self.steps.clear()

    def log_validation(self, iteration: int, totals: Totals) -> None:
        """Record a validation after `iteration`."""
        if not self.is_writer:
            return
        perplexity = math.exp(min(totals.loss, 20))
        self._record(iteration, {"lm loss validation": totals.loss, "lm loss validation ppl": perplexity})
        logger.info(
            f"validation at iteration {iteration} | lm loss: {totals.loss:.6f} | ppl: {perplexity:.4f} | "
            f"{totals.num_samples} samples"
        )

    def log_captions(self, iteration: int, captions: list[Caption]) -> None:
        """Show what the model says to a few images after `iteration`; the images, once in a process's life."""
        if not self.is_writer:
            return
        for caption in captions:
            tag = f"captions/{caption.key}"
            said, reference = (
                printable(textwrap.shorten(text, 300, placeholder=" ...")) for text in (caption.said, caption.reference)
            )
            # Indented: TensorBoard shows markdown, and captions are none.
            self.board.add_text(tag, f"    model:     {said}\n    reference: {reference}", iteration)
            if caption.image is not None and caption.key not in self.shown:
                self.board.add_image(tag, caption.image, iteration)
                self.shown.add(caption.key)
            logger.info(f"caption of {caption.key} at iteration {iteration} | model: {said} | reference: {reference}")

    def flush(self) -> None:
        """Write what is buffered: before a checkpoint, so that the curve up to it survives a kill."""
        if self.is_writer:
            self.board.flush()

    def _record(self, iteration: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, iteration)
        # A resumed run writes an iteration that a killed one had done again: the later line counts.
        try:
            self.lines.write(json.dumps({"iteration": iteration, **values}) + "\n")
        except OSError as error:
            raise OSError(f"{self.lines.name}: cannot be written ({error.strerror})") from error

    def _tflops_per_second(self, steps: list[Step]) -> float:
        """What each device computed per second, in 1e12 operations; see `flops.step_flops`."""
        flops = sum(sum(step_flops(self.llava, self.config.model, step.totals).values()) for step in steps)
        return flops / sum(step.seconds for step in steps) / self.world_size / 1e12

    def _line(self, iteration: int, learning_rate: float) -> str:
        """The interval's mean loss and speed, the last step's gradient norm, in less than 200 characters."""
        totals = Totals.mean([step.totals for step in self.steps])
        seconds = sum(step.seconds for step in self.steps)
        norm, last = self.steps[-1].grad_norm, self.config.training.train_iters
        pace = (time.monotonic() - self.start) / (iteration - self.first_iteration + 1)
        wait = totals.data_seconds / seconds
        return " | ".join(
            (
                f"iteration {iteration:{len(str(last))}d}/{last}",
                f"lm loss: {totals.loss:.6f}",
                f"lr: {learning_rate:.4E}",
                f"grad norm: {'overflow' if norm is None else f'{norm:.4f}'}",
                f"ms/iteration: {1000 * seconds / len(self.steps):.1f}",
                f"TFLOP/s: {self._tflops_per_second(self.steps):.3g}",
                f"tokens/s: {totals.num_tokens / seconds:.0f}",
                *([f"data wait: {wait:.1%}"] if wait > LONG_WAIT else []),
                *([f"cut: {totals.num_truncated}"] if totals.num_truncated else []),
                f"time left: {timedelta(seconds=round((last - iteration) * pace))}",
            )
        )


def _open_lines(path: Path) -> IO[str]:
    """Open a file for further lines after its last whole one: a run may have been killed while it wrote another.

    Lines before that stay as they are, whatever a crash of the machine left in them. Raises OSError that names it.
    """
    try:
        with path.open("rb+" if path.exists() else "wb+") as file:
            end = file.seek(0, os.SEEK_END)
            # Not by lines: blocks that were never written are zeros, without an end of a line.
            while end and not _tail(file, end).rpartition(b"\n")[1]:
                end -= min(end, TAIL)
            file.truncate(end - len(_tail(file, end).rpartition(b"\n")[2]))
        return path.open("a", buffering=1, encoding="utf-8")
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); move it away") from error


def _tail(file: IO[bytes], end: int) -> bytes:
    """The last bytes before `end`."""
    file.seek(max(0, end - TAIL))
    return file.read(min(end, TAIL))


def memory() -> dict[str, int]:
    """Bytes in use by rank 0: on its GPU as torch counts them, without one its process's in main memory (Linux)."""
    if torch.cuda.is_available():
        stats = torch.cuda.memory_stats()
        return {
            "mem-reserved-bytes": stats["reserved_bytes.all.current"],
            "mem-allocated-bytes": stats["allocated_bytes.all.current"],
            "mem-max-allocated-bytes": stats["allocated_bytes.all.peak"],
        }
    statm = Path("/proc/self/statm")
    return {"mem-rss-bytes": int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")} if statm.exists() else {}
