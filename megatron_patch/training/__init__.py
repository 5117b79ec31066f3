"""The training loop on megatron.core's schedules, data parallelism and optimizer."""
