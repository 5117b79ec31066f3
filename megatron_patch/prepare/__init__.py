"""From LLaVA's json and images to tar shards that energon reads."""

from megatron_patch.config.dataset import Settings
from megatron_patch.prepare.convert import Report, convert
from megatron_patch.prepare.samples import ANNOTATIONS

__all__ = ["ANNOTATIONS", "Report", "Settings", "convert"]
