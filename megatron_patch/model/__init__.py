"""The LLaVA network, assembled from megatron.core's parts."""
