"""LLaVA on Megatron-Core: data, checkpoints, training."""

from megatron_patch import forking, patches

forking.install()
patches.install()
