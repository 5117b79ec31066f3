"""Between Hugging Face, megatron.core's whole state dict (the form that all meet in), and one rank's part of it.

A conversion is a plan: `to_mcore(rows, hf)` and `to_hf(rows, mcore)` are readers of views, which say where a tensor's
values come from. `stream.py` moves the bytes, so no model is ever whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_patch.conversion.companions import CONFIG, TRACKER, checkpoint_folder
from megatron_patch.families.layout import merge, pad_vocab, shard, split
from megatron_patch.families.llava import pipeline_copies, read_config
from megatron_patch.families.llava import rows as llava_rows
from megatron_patch.families.shapes import hf_shapes
from megatron_patch.families.sizes import Llava
from megatron_patch.families.stages import Stage, pipeline_stages
from megatron_patch.families.table import Weight
from megatron_patch.files.names import COMMON, model_folder
from megatron_patch.files.whole import write_whole
from megatron_patch.stores import mp_rank
from megatron_patch.stores.mp_rank import MpRankReader
from megatron_patch.stores.reader import Reader, Views
from megatron_patch.tensor_io import disk
from megatron_patch.tensor_io.disk import sync_tree
from megatron_patch.tensor_io.stream import BUFFER, read
from megatron_patch.tensor_io.view import View

RELEASE = "release"
Shapes = Mapping[str, tuple[int, ...]]
"""Names -> shapes."""


def to_mcore(
    rows: Iterable[Weight], hf: Reader, unused: Shapes | None = None, dtype: torch.dtype | None = None
) -> Reader:
    """Hugging Face's tensors (the hub's names) as megatron.core's whole state dict.

    `unused`: what is there and has no place in it. dtype None: as stored. Raises ValueError, one line, when a
    tensor is missing, is not in the table, or has not the shape that the config gives.
    """
    rows = list(rows)
    check_hf(rows, hf, unused)
    views = {weight.mcore: _lazy(merge, weight, hf, weight.hf, dtype) for weight in rows}
    return _Planned(hf, {weight.mcore: weight.shape for weight in rows}, views)


def to_hf(rows: Iterable[Weight], mcore: Reader, dtype: torch.dtype | None = None) -> Reader:
    """The inverse of `to_mcore`: megatron.core's whole tensors under Hugging Face's (the hub's) names."""
    rows = list(rows)
    check_mcore(rows, mcore)
    shapes, views = {}, {}
    for weight in rows:
        for position, (name, shape) in enumerate(zip(weight.hf, hf_shapes(weight), strict=True)):
            shapes[name] = shape
            views[name] = _lazy(_split_part(position), weight, mcore, (weight.mcore,), dtype)
    return _Planned(mcore, shapes, views)


def _split_part(position: int) -> Callable[[Weight, Sequence[View]], View]:
    return lambda weight, wholes: split(weight, wholes[0])[position]


def _lazy(
    layout: Callable[[Weight, Sequence[View]], View],
    weight: Weight,
    reader: Reader,
    names: Sequence[str],
    dtype: torch.dtype | None,
) -> Callable[[], View]:
    """The plan of one tensor, made when it is asked for."""
    return lambda: layout(weight, [reader.view(name).to(dtype) for name in names])


class _Planned(Reader):
    """A reader whose views are made of another's."""

    def __init__(
        self, origin: Reader, shapes: dict[str, tuple[int, ...]], views: dict[str, Callable[[], View]]
    ) -> None:
        self.source = origin.source
        self.shapes = shapes
        self.views = views

    def view(self, name: str) -> View:
        """Where one tensor's values lie."""
        return self.views[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, as the table gives it."""
        return self.shapes[name]


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


def append_mean_rows(table: View, num_rows: int) -> View:
    """`table` [n, h] with its mean row repeated up to `num_rows` rows."""
    shape = (num_rows - table.shape[0], table.shape[1])
    name = f"the mean row of {table.sources[0].name}"
    return View.cat([table, View.made(lambda: _mean_row(table).expand(shape), shape, table.dtype, name)])


def _mean_row(table: View) -> Tensor:
    """The mean of a view's rows [1, h], read in pieces. Summed in fp64, so that it does not depend on their size."""
    total = torch.zeros(1, table.columns, dtype=torch.float64)
    # The table itself is compared when it is copied; here each piece would have all the others read again.
    for piece in _pieces(table.unchecked()):
        total += read({"rows": piece})["rows"].double().sum(dim=0, keepdim=True)
    return (total / table.rows).to(table.dtype)


def _pieces(table: View) -> Iterator[View]:
    """A view's rows, as many at a time as a buffer holds."""
    count = max(1, BUFFER // (table.columns * table.dtype.itemsize))
    for start in range(0, table.rows, count):
        yield table.narrow(0, start, min(count, table.rows - start))


def check_hf(rows: Iterable[Weight], hf: Reader, unused: Shapes | None = None) -> None:
    """Raise ValueError unless `hf` holds exactly the table's tensors and `unused`, in the shapes of the config."""
    expected = {name: shape for weight in rows for name, shape in zip(weight.hf, hf_shapes(weight), strict=True)}
    check_coverage({**expected, **(unused or {})}, hf)


def check_mcore(rows: Iterable[Weight], mcore: Reader) -> None:
    """Raise ValueError unless `mcore` holds exactly the table's tensors, in the shapes that the config gives."""
    check_coverage({weight.mcore: weight.shape for weight in rows}, mcore)


def check_coverage(expected: Shapes, reader: Reader) -> None:
    """Raise ValueError unless `reader` holds exactly `expected`."""
    present = set(reader)
    missing = [name for name in expected if name not in present]
    if missing:
        raise ValueError(f"{reader.source}: {_some(missing)} missing; the model of its config.json needs every tensor")
    extra = [name for name in reader if name not in expected]
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


def rank_state_dict(mcore: Reader, llava: Llava, stage: Stage, tp_rank: int, tp_size: int) -> dict[str, Tensor]:
    """One rank's tensors of a whole model: the local spec's names, the stage's layer indices, padded vocabulary."""
    return read({name: view for name, (_, view) in rank_views(mcore, llava, stage, tp_rank, tp_size).items()})


def rank_views(mcore: Reader, llava: Llava, stage: Stage, tp_rank: int, tp_size: int) -> dict[str, tuple[Weight, View]]:
    """Plans of `rank_state_dict`, each with its row of the table."""
    views = {}
    rows = {weight.mcore: weight for weight in llava_rows(llava)}
    copies = {} if stage.pre_process else pipeline_copies(llava)
    for mcore_name, original in {**{name: name for name in rows}, **copies}.items():
        name = stage.local_name(mcore_name)
        if name is None:
            continue
        weight, whole = rows[original], mcore.view(original)
        if weight.layout == "vocab":
            whole = pad_vocab(whole, llava.language.padded_vocab_size(tp_size))
        views[name] = (replace(weight, mcore=mcore_name), shard(weight, whole, tp_size)[tp_rank])
    return views


def open_mcore(folder: Path, llava: Llava, check: bool = True, step: int | None = None) -> Reader:
    """A Megatron-Core checkpoint's whole, unpadded state dict, lazily: shards or torch_dist, at any saved TP and PP.

    `folder` holds the tracker file, or is one iteration. `check`: compare what is read with the checkpoint's manifest,
    where it has one. `step`: the iteration; None: the tracker's.

    Raises ValueError or OSError, one line that names the file, when the checkpoint is incomplete, damaged, or not the
    model that `llava` describes.
    """
    target = checkpoint_folder(folder, step)
    _check_vocabulary(model_folder(Path(folder)), target, llava)
    kind = MpRankReader
    if (target / ".metadata").is_file():
        from megatron_patch.stores.torch_dist import TorchDistReader as kind  # half a second, where it is needed
    rows = llava_rows(llava)
    reader = kind(target, rows, check)
    reader = _without_copies(reader, pipeline_copies(llava))
    check_mcore(rows, reader)
    return reader


def _check_vocabulary(folder: Path, target: Path, llava: Llava) -> None:
    """Compare its length with what lies beside the weights and in them.

    Shapes tell every other size; a vocabulary that pads to the same one would pass for another's.
    """
    said: dict[Path, Any] = {}
    if (folder / CONFIG).is_file():
        said[folder / CONFIG] = read_config(folder).language.vocab_size
    for path in sorted([*target.glob(f"mp_rank_*/{mp_rank.FILE}"), *target.glob(COMMON)])[:1]:
        with suppress(ValueError):  # a damaged shard is the reader's to refuse, other programs' args are not read
            said[path] = mp_rank.saved_args(path).get("vocab_size")
    for path, own in said.items():
        if own not in (None, llava.language.vocab_size):
            raise ValueError(
                f"{path}: the vocabulary has {own} tokens, and the model that was asked for "
                f"{llava.language.vocab_size}; describe the model by the checkpoint's own config.json, or one like it"
            )


def _without_copies(reader: Reader, copies: dict[str, str]) -> Reader:
    """Leave out what a last stage holds a second time. Raises ValueError when it is not the same tensor."""
    found = {copy: original for copy, original in copies.items() if copy in reader and original in reader}
    for copy, original in found.items():
        first, second = reader.view(original), reader.view(copy)
        first, second = (view.narrow(0, 0, min(first.shape[0], second.shape[0])) for view in (first, second))
        for one, other in zip(_pieces(first), _pieces(second), strict=True):
            if not torch.equal(*read({"one": one, "other": other}).values()):
                raise ValueError(
                    f"{reader.source}: {copy} is not {original}, though the model's config.json ties them; convert or "
                    "copy the checkpoint again"
                )
    return Views({name: reader.view(name) for name in reader if name not in found}, reader) if found else reader


def load_rank(folder: Path, llava: Llava, stage: Stage, *, tp_rank: int, tp_size: int) -> dict[str, Tensor]:
    """One rank's state dict of the Megatron-Core checkpoint in `folder`, however that is sharded.

    Names are the local spec's, layers count from 0 within the stage, the vocabulary is padded for `tp_size`, types are
    as saved. Raises as `open_mcore` does.
    """
    return rank_state_dict(open_mcore(folder, llava), llava, stage, tp_rank, tp_size)


def write_shards(
    folder: Path,
    mcore: Reader,
    llava: Llava,
    *,
    tp_size: int,
    stages: Sequence[Sequence[Stage]],
    args: dict,
    source: Sequence[dict] = (),
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Write `folder`/release/mp_rank_* and manifest.json, then the tracker file.

    `stages`: each pipeline rank's, as `pipeline_stages` gives them. `args`: plain values about the model, kept in every
    shard. `source`: what the manifest says about where the weights come from. `progress` is called with the number of
    bytes of each piece that is written.
    """
    sizes = {
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": len(stages),
        "virtual_pipeline_model_parallel_size": len(stages[0]) if len(stages[0]) > 1 else None,
    }
    ranks = [
        mp_rank.Rank(
            tp_rank, pp_rank, [rank_views(mcore, llava, stage, tp_rank, tp_size) for stage in chunks], {**args, **sizes}
        )
        for pp_rank, chunks in enumerate(stages)
        for tp_rank in range(tp_size)
    ]
    mp_rank.write_ranks(folder / RELEASE, ranks, sizes, source, progress)
    _write_tracker(folder)


def write_dist(
    folder: Path,
    mcore: Reader,
    llava: Llava,
    *,
    args: dict,
    source: Sequence[dict] = (),
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Write `folder`/release as a torch_dist checkpoint, then the tracker file. Arguments: as `write_shards`."""
    from megatron_patch.stores.torch_dist_writer import write_torch_dist

    ((stage,),) = pipeline_stages([llava.language.num_layers])
    whole = rank_views(mcore, llava, stage, tp_rank=0, tp_size=1)
    common = {"args": args, "checkpoint_version": mp_rank.CHECKPOINT_VERSION, "iteration": 0}
    write_torch_dist(folder / RELEASE, whole, common, source, progress)
    _write_tracker(folder)


def _write_tracker(folder: Path) -> None:
    sync_tree(folder)
    disk.reached("shards synced")
    write_whole(folder / TRACKER, f"{RELEASE}\n")


def num_bytes_written(llava: Llava, tp_size: int, pp_size: int, dtype: torch.dtype) -> int:
    """Size of all tensors that `write_shards` writes: replicated ones once per tensor-parallel rank."""
    count = 0
    copies = pipeline_copies(llava).values() if pp_size > 1 else ()
    for weight in (*llava_rows(llava), *(weight for weight in llava_rows(llava) if weight.mcore in copies)):
        rows, *rest = weight.shape
        if weight.layout == "vocab":
            rows = llava.language.padded_vocab_size(tp_size)
        count += math.prod((rows, *rest)) * (tp_size if weight.axis is None else 1)
    return count * dtype.itemsize


def _some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are, with the verb that follows."""
    more = len(names) - 1
    return f"{names[0]} (and {more} more) are" if more else f"{names[0]} is"
