"""What a run shows: a line for people, scalars for TensorBoard, a line of JSON for machines."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from datetime import timedelta

from torch.utils.tensorboard import SummaryWriter

from megatron_patch.config import Config
from megatron_patch.training.log import logger
from megatron_patch.training.step import Step, Totals

SPIKE = 10
"""A loss so many times the median of the last 20 is reported."""


class Metrics:
    """Rank 0's log and TensorBoard; on other ranks it does nothing.

    Scalars carry Megatron-LM's names. `first_iteration` is the first that this process computes: points that a killed
    run wrote at or behind it are dropped, so that a resumed curve has no double points.
    """

    def __init__(self, config: Config, first_iteration: int, is_writer: bool) -> None:
        self.config = config
        self.is_writer = is_writer
        self.steps: list[Step] = []
        self.first_iteration = first_iteration
        self.start = time.monotonic()
        self.usual: deque[float] = deque(maxlen=20)
        if is_writer:
            self.lines = (config.checkpoint.output / "log" / "metrics.jsonl").open("a", buffering=1)
            self.board = SummaryWriter(config.checkpoint.output / "tensorboard", purge_step=first_iteration)

    def log(self, iteration: int, step: Step, learning_rate: float, consumed_samples: int) -> None:
        """Record an iteration (counted from 1) and, at the end of an interval, print its line."""
        if not self.is_writer:
            return
        values = {
            "lm loss": step.totals.loss,
            "learning-rate": learning_rate,
            "loss-scale": step.loss_scale,
            "batch-size": step.totals.num_samples,
            "iteration-time": step.seconds,
            "samples-per-second": step.totals.num_samples / step.seconds,
            "tokens-per-second": step.totals.num_tokens / step.seconds,
            "consumed-samples": consumed_samples,
        }
        if step.grad_norm is not None:
            values["grad-norm"] = step.grad_norm
        self._record(iteration, values)
        self._report_spike(iteration, step.totals.loss)
        self.steps.append(step)
        last = self.config.training.train_iters
        if iteration % self.config.training.log_interval == 0 or iteration == last:
            logger.info(self._line(iteration, learning_rate, consumed_samples))
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

    def flush(self) -> None:
        """Write what is buffered: before a checkpoint, so that the curve up to it survives a kill."""
        if self.is_writer:
            self.board.flush()

    def _record(self, iteration: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, iteration)
        # A resumed run writes an iteration that a killed one had done again: the later line counts.
        self.lines.write(json.dumps({"iteration": iteration, **values}) + "\n")

    def _report_spike(self, iteration: int, loss: float) -> None:
        if self.usual and loss > SPIKE * statistics.median(self.usual):
            logger.warning(f"iteration {iteration}: loss {loss:.4f} is more than {SPIKE} times the usual one")
        self.usual.append(loss)

    def _line(self, iteration: int, learning_rate: float, consumed_samples: int) -> str:
        totals = Totals.mean([step.totals for step in self.steps])
        seconds = sum(step.seconds for step in self.steps)
        norm = self.steps[-1].grad_norm
        left = self.config.training.train_iters - iteration
        pace = (time.monotonic() - self.start) / (iteration - self.first_iteration + 1)
        return " | ".join(
            (
                f"iteration {iteration:8d}/{self.config.training.train_iters:8d}",
                f"lm loss: {totals.loss:.6f}",
                f"learning rate: {learning_rate:.6E}",
                f"grad norm: {'overflow' if norm is None else f'{norm:.4f}'}",
                f"time per iteration (ms): {1000 * seconds / len(self.steps):.1f}",
                f"samples/s: {totals.num_samples / seconds:.1f}",
                f"tokens/s: {totals.num_tokens / seconds:.1f}",
                f"consumed samples: {consumed_samples}",
                f"time left: {timedelta(seconds=round(left * pace))}",
            )
        )
