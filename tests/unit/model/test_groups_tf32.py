"""What joining the other processes says about fp32."""

from __future__ import annotations

import torch

from megatron_patch.config.train import Parallel
from tests.distributed import ranks


def test_fp32_is_not_rounded_to_tf32(tmp_path):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    ranks.groups.start(Parallel(), seed=1, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    ranks.stop()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
