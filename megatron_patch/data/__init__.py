"""From samples to batches of tokens and pixels. Imports no megatron.core."""
