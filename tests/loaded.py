"""What torch, and what megatron.core and transformers load: imported once, for the processes forked afterwards."""

# ruff: noqa: F401
from megatron_patch.files.terminal import loading

with loading():
    import torch
    import torch._inductor.compile_fx
    import torch.distributed._tensor
    import torch.distributed.checkpoint
    import torch.utils.tensorboard
    import transformers
