"""What tensors and sizes are called, in megatron.core and in Hugging Face: one table per model."""
