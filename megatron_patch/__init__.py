"""LLaVA on Megatron-Core: data, checkpoints, training."""

from megatron_patch import patches

patches.install()
