"""LLaVA's own `mm_projector.bin`: what its pretraining saves, the projector's four tensors in a file of torch.save."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_patch.stores.reader import InMemory, Reader, open_torch_file, stored_view
from megatron_patch.tensor_io.archives import Stored
from megatron_patch.tensor_io.stream import read

FILE = "mm_projector.bin"
HUB = "multi_modal_projector."
LLAVA = "model.mm_projector."
# LLaVA's projector is a torch.nn.Sequential: linear, GELU, linear.
NAMES = {
    f"{LLAVA}{position}.{what}": f"{HUB}{name}.{what}"
    for position, name in ((0, "linear_1"), (2, "linear_2"))
    for what in ("weight", "bias")
}


def read_mm_projector(path: Path) -> Reader:
    """The file's tensors under the hub's names. Raises ValueError or OSError, one line that names the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected LLaVA's {FILE}")
    tensors = open_torch_file(path)
    if not isinstance(tensors, dict) or set(tensors) != set(NAMES):
        found = ", ".join(sorted(map(str, tensors))[:5]) if isinstance(tensors, dict) else type(tensors).__name__
        raise ValueError(f"{path}: holds {found or 'nothing'}; expected {', '.join(NAMES)}, as LLaVA-1.5's has them")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Stored | Tensor):
            raise ValueError(f"{path}: {name} is a {type(tensor).__name__}; expected a tensor")
    views = {NAMES[name]: stored_view(path, name, tensor) for name, tensor in tensors.items()}
    return InMemory(read(views), str(path))


def write_mm_projector(folder: Path, tensors: Reader) -> None:
    """Write `folder`/mm_projector.bin of a model's tensors (the hub's names), which weights_only=True reads."""
    torch.save({name: tensors[hub].clone() for name, hub in NAMES.items()}, Path(folder) / FILE)
