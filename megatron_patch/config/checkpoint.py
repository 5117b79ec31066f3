"""Where a run's results go. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_patch.config.checks import require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where results go."""

    output: Path
    """Folder that gets checkpoint/, tensorboard/ and log/. A run that finds a checkpoint there goes on from it."""

    save_interval: int = 1000
    """Iterations between saves. The last iteration is saved too."""

    async_save: bool = False
    """Write checkpoints while training goes on, from a copy of each rank's state in host memory."""

    keep_checkpoints: int | None = None
    """Newest checkpoints to keep; none: all."""

    ckpt_step: int | None = None
    """Iteration of the run in --output to go on from; none: the last. Leave it out when the run is started again."""

    def __post_init__(self) -> None:
        require_positive(self, "save_interval")
        if self.keep_checkpoints is not None:
            require_positive(self, "keep_checkpoints")
        if self.ckpt_step is not None:
            require_not_negative(self, "ckpt_step")

    @property
    def folder(self) -> Path:
        """Where iterations are saved."""
        return self.output / "checkpoint"
