"""Every model that there is a table for, by Hugging Face's `model_type`: a new one is its table and a name here."""

from __future__ import annotations

from megatron_patch.families.clip import CLIP
from megatron_patch.families.llama import LLAMA
from megatron_patch.families.mistral import MISTRAL
from megatron_patch.families.qwen2 import QWEN2
from megatron_patch.families.siglip import SIGLIP

LANGUAGE_FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2)}
VISION_FAMILIES = {family.name: family for family in (CLIP, SIGLIP)}
