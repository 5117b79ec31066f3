"""Between Hugging Face, megatron.core's whole state dict (the hub of every way), and one rank's part of it.

A conversion is a view: `to_mcore(rows, hf)` and `to_hf(rows, mcore)` are readers that compute a tensor when it is asked
for. So no model is ever whole in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_patch.checkpoint import mp_rank
from megatron_patch.checkpoint.companions import TRACKER, checkpoint_folder
from megatron_patch.checkpoint.mp_rank import MpRankReader
from megatron_patch.checkpoint.reader import Reader
from megatron_patch.checkpoint.torch_dist import TorchDistReader
from megatron_patch.config import Llava
from megatron_patch.families.family import Weight
from megatron_patch.families.layout import hf_shapes, merge, pad_vocab, shard, split
from megatron_patch.families.llava import rows as llava_rows

LANGUAGE_LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)(\..*)")


def to_mcore(
    rows: Iterable[Weight], hf: Reader, unused: Sequence[str] = (), dtype: torch.dtype | None = None
) -> Reader:
    """Hugging Face's tensors (the hub's names) as megatron.core's whole state dict.

    `unused`: names that are there and have no place in it. dtype None: as stored. Raises ValueError, one line, when a
    tensor is missing, is not in the table, or has not the shape that the config gives.
    """
    rows = list(rows)
    expected = {name: shape for weight in rows for name, shape in zip(weight.hf, hf_shapes(weight), strict=True)}
    check_coverage(expected, hf, also=unused)

    def compute(weight: Weight) -> Tensor:
        return cast(merge(weight, [hf[name] for name in weight.hf]), dtype, weight.mcore)

    return _View(hf.source, {weight.mcore: (weight.shape, weight) for weight in rows}, compute)


def to_hf(rows: Iterable[Weight], mcore: Reader, dtype: torch.dtype | None = None) -> Reader:
    """The inverse of `to_mcore`: megatron.core's whole tensors under Hugging Face's (the hub's) names."""
    rows = list(rows)
    check_mcore(rows, mcore)
    last: tuple[str, tuple[Tensor, ...]] = ("", ())

    def compute(place: tuple[Weight, int]) -> Tensor:
        nonlocal last
        weight, position = place
        if last[0] != weight.mcore:  # q, k and v come from one tensor, and are asked for one after another
            last = (weight.mcore, split(weight, mcore[weight.mcore]))
        return cast(last[1][position], dtype, weight.hf[position])

    places = {
        name: (shape, (weight, position))
        for weight in rows
        for position, (name, shape) in enumerate(zip(weight.hf, hf_shapes(weight), strict=True))
    }
    return _View(mcore.source, places, compute)


class _View(Reader):
    """A reader that computes its tensors: name -> (shape, what `compute` makes the tensor of)."""

    def __init__(self, source: str, places: dict[str, tuple[tuple[int, ...], object]], compute: Callable) -> None:
        self.source = source
        self.places = places
        self.compute = compute

    def __getitem__(self, name: str) -> Tensor:
        return self.compute(self.places[name][1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name][0]


def cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    """`tensor` in another type. Raises ValueError when a value is too large for it (fp16 ends at 65504)."""
    if dtype is None or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype == torch.float16 and not torch.equal(result.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name}: holds values that fp16 cannot (beyond 65504); use bf16 or fp32")
    return result


def new_projector(rows: Iterable[Weight], seed: int) -> dict[str, Tensor]:
    """fp32 weights for linear layers that no source has, as torch.nn.Linear (and so LLaVA) draws them.

    `rows`: weights and biases, each bias after its weight. Hugging Face's names; the same for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for weight in rows:
        (name,) = weight.hf
        fan_in = weight.shape[1] if name.endswith(".weight") else tensors[name.removesuffix("bias") + "weight"].shape[1]
        bound = fan_in**-0.5
        tensors[name] = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
    return tensors


def append_mean_rows(table: Tensor, num_rows: int) -> Tensor:
    """`table` [n, h] with its mean row (computed in fp32) repeated up to `num_rows` rows."""
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(num_rows - table.shape[0], -1)])


def check_mcore(rows: Iterable[Weight], mcore: Reader) -> None:
    """Raise ValueError unless `mcore` holds exactly the table's tensors, in the shapes that the config gives."""
    check_coverage({weight.mcore: weight.shape for weight in rows}, mcore)


def check_coverage(expected: dict[str, tuple[int, ...]], reader: Reader, also: Sequence[str] = ()) -> None:
    """Raise ValueError unless `reader` holds exactly `expected` (name -> shape) and the names in `also`."""
    present = set(reader)
    missing = [name for name in (*expected, *also) if name not in present]
    if missing:
        raise ValueError(f"{reader.source}: {_some(missing)} missing; the model of its config.json needs every tensor")
    known = {*expected, *also}
    extra = [name for name in reader if name not in known]
    if extra:
        raise ValueError(
            f"{reader.source_of(extra[0])}: {_some(extra)} not in the table of this model, and nothing is dropped "
            "silently; check that config.json and weights belong together"
        )
    for name, shape in expected.items():
        found = reader.shape(name)
        if found != shape:
            raise ValueError(
                f"{reader.source_of(name)}: {name} has shape {list(found)}, by config.json {list(shape)} is expected; "
                "check that config.json and weights belong together"
            )


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage (or one virtual stage of it) holds of the language model."""

    layers: range
    """Its layers, by their index in the whole model. Within the stage they count from 0."""

    pre_process: bool
    """Whether it holds the embedding, the vision tower and the projector."""

    post_process: bool
    """Whether it holds the final norm and the output layer."""

    def local_name(self, name: str) -> str | None:
        """A tensor's name within this stage; None when it lies in another one."""
        match = LANGUAGE_LAYER.fullmatch(name)
        if match:
            layer = int(match[2])
            return f"{match[1]}{layer - self.layers.start}{match[3]}" if layer in self.layers else None
        first = not name.startswith("language_model.") or name.startswith("language_model.embedding.")
        return name if (self.pre_process if first else self.post_process) else None


def even_stage(num_layers: int, pp_rank: int, pp_size: int) -> Stage:
    """One of `pp_size` stages of equal length. Raises ValueError when the layers cannot be cut so."""
    if num_layers % pp_size:
        raise ValueError(f"{num_layers} layers: not a multiple of {pp_size} pipeline stages")
    length = num_layers // pp_size
    return Stage(
        layers=range(pp_rank * length, (pp_rank + 1) * length),
        pre_process=pp_rank == 0,
        post_process=pp_rank == pp_size - 1,
    )


def rank_state_dict(mcore: Reader, llava: Llava, stage: Stage, tp_rank: int, tp_size: int) -> dict[str, Tensor]:
    """One rank's tensors of a whole model: the local spec's names, the stage's layer indices, padded vocabulary."""
    return dict(rank_tensors(mcore, llava, stage, tp_rank, tp_size))


def rank_tensors(mcore: Reader, llava: Llava, stage: Stage, tp_rank: int, tp_size: int) -> Iterator[tuple[str, Tensor]]:
    """`rank_state_dict`, one tensor after another. Each has its own memory."""
    for weight in llava_rows(llava):
        name = stage.local_name(weight.mcore)
        if name is None:
            continue
        whole = mcore[weight.mcore]
        if weight.layout == "vocab":
            whole = pad_vocab(whole, llava.language.padded_vocab_size(tp_size))
        yield name, shard(weight, whole, tp_size)[tp_rank].clone(memory_format=torch.contiguous_format)


def open_mcore(folder: Path, llava: Llava) -> Reader:
    """A Megatron-Core checkpoint's whole, unpadded state dict, lazily: shards or torch_dist, at any saved TP and PP.

    `folder` holds the tracker file. Raises ValueError or OSError, one line that names the file, when the checkpoint is
    incomplete, damaged, or not the model that `llava` describes.
    """
    target = checkpoint_folder(folder)
    rows = llava_rows(llava)
    reader = TorchDistReader(target, rows) if (target / ".metadata").is_file() else MpRankReader(target, rows)
    check_mcore(rows, reader)
    return reader


def load_rank(
    folder: Path, llava: Llava, *, tp_rank: int, tp_size: int, pp_rank: int, pp_size: int, stage: Stage | None = None
) -> dict[str, Tensor]:
    """One rank's state dict of the Megatron-Core checkpoint in `folder`, whatever TP and PP it was saved at.

    Names are the local spec's, layers count from 0 within the stage, the vocabulary is padded for `tp_size`, types are
    as saved. `stage`: another part of the model than the even cut's (virtual or unequal stages). Raises as
    `open_mcore` does.
    """
    stage = stage or even_stage(llava.language.num_layers, pp_rank, pp_size)
    return rank_state_dict(open_mcore(folder, llava), llava, stage, tp_rank, tp_size)


def write_shards(
    folder: Path,
    mcore: Reader,
    llava: Llava,
    *,
    tp_size: int,
    pp_size: int,
    args: dict,
    progress: Callable[[Tensor], None] = lambda tensor: None,
) -> None:
    """Write `folder`/release/mp_rank_*, then the tracker file. One rank's part is in memory at a time.

    `args`: plain values about the model, kept in every shard. `progress` is called with every tensor that is ready.
    """
    for pp_rank in range(pp_size):
        stage = even_stage(llava.language.num_layers, pp_rank, pp_size)
        for tp_rank in range(tp_size):
            model = {}
            for name, tensor in rank_tensors(mcore, llava, stage, tp_rank, tp_size):
                model[name] = tensor
                progress(tensor)
            name = mp_rank.rank_name(tp_rank, pp_rank, pp_size)
            sizes = {"tensor_model_parallel_size": tp_size, "pipeline_model_parallel_size": pp_size}
            mp_rank.write_rank(folder / "release", name, model, {**args, **sizes})
    (folder / TRACKER).write_text("release\n")


def num_bytes_written(llava: Llava, tp_size: int, dtype: torch.dtype) -> int:
    """Size of all tensors that `write_shards` writes: replicated ones once per tensor-parallel rank."""
    count = 0
    for weight in llava_rows(llava):
        rows, *rest = weight.shape
        if weight.layout == "vocab":
            rows = llava.language.padded_vocab_size(tp_size)
        count += math.prod((rows, *rest)) * (tp_size if weight.axis is None else 1)
    return count * dtype.itemsize


def _some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are, with the verb that follows."""
    more = len(names) - 1
    return f"{names[0]} (and {more} more) are" if more else f"{names[0]} is"
