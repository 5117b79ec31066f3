"""Checkpoints: where tensors lie, and their way between Hugging Face and megatron.core."""
