"""What a run needs and does, by arithmetic: memory, operations, time. No torch, no megatron.core."""
