"""From LLaVA's json and pictures to tar shards that energon reads."""

from megatron_patch.data.webdataset.convert import Report, convert
from megatron_patch.data.webdataset.samples import ANNOTATIONS
from megatron_patch.data.webdataset.settings import Settings

__all__ = ["ANNOTATIONS", "Report", "Settings", "convert"]
