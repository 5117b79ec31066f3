"""LLaVA on Megatron-Core: data, checkpoints, training."""
