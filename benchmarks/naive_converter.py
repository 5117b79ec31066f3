"""The usual way to convert, to measure against: the whole model in memory, a whole second copy, then a file per rank.

python naive_converter.py SOURCE TARGET TP
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def main() -> None:
    """Only what costs time and memory: no vision tower, no checks."""
    source, target, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    hf = {}
    for path in sorted(source.glob("*.safetensors")):
        hf.update(load_file(path))
    whole = {}
    for name, tensor in hf.items():
        if name.endswith("q_proj.weight"):
            key, value = (hf[name.replace("q_proj", f"{letter}_proj")] for letter in "kv")
            groups = key.shape[0] // 128
            parts = [part.view(groups, -1, part.shape[1]) for part in (tensor, key, value)]
            whole[name.replace("q_proj", "linear_qkv")] = torch.cat(parts, dim=1).flatten(0, 1)
        elif name.endswith("gate_proj.weight"):
            whole[name.replace("gate_proj", "linear_fc1")] = torch.cat([tensor, hf[name.replace("gate", "up")]])
        elif not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            whole[name] = tensor.clone()
    for rank in range(size):
        model = {}
        for name, tensor in whole.items():
            if name.endswith("linear_fc1.weight"):
                model[name] = torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                model[name] = tensor.chunk(size, dim=1)[rank].contiguous()
            else:
                model[name] = tensor.chunk(size)[rank].clone() if tensor.dim() > 1 else tensor
        folder = target / f"mp_rank_{rank:02d}"
        folder.mkdir(parents=True)
        with (folder / "model_optim_rng.pt").open("wb") as file:
            torch.save({"model": model}, file)
            os.fsync(file.fileno())


if __name__ == "__main__":
    main()
