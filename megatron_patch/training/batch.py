"""From a batch of the data to what one rank's model takes of it, without the host ever waiting for a GPU.

Which positions hold a patch or a label is found on the CPU, where the text is, and goes to the device with it.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_patch.config.train import Parallel
from megatron_patch.data.task_encoder import PADDING, Batch
from megatron_patch.data.tokenize import IGNORE
from megatron_patch.model.llava import find_patches, find_positions


def padded_length(length: int, parallel: Parallel, multiple: int = 1) -> int:
    """The next length that context- and tensor-parallel ranks can share in multiples of `multiple` (fp8's)."""
    return length + -length % (parallel.sequence_multiple * multiple)


def pad(batch: Batch, length: int) -> Batch:
    """The batch padded on the right to `length` positions. A packed row's padding belongs to its last sample."""
    padding = length - batch.labels.shape[1]
    if padding == 0:
        return batch
    segments = batch.segment_lengths
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, padding), value=PADDING),
        labels=F.pad(batch.labels, (0, padding), value=IGNORE),
        segment_lengths=None if segments is None else [*segments[:-1], segments[-1] + padding],
    )


def shard_sequence(batch: Batch, image_token_id: int, parallel: Parallel, multiple: int = 1) -> dict[str, Tensor]:
    """This context-parallel rank's part of a batch's text, on the CPU: int64 [b, s / CP] each.

    `input_ids`, 0 where there is a patch; `image_rows`: the number of the patch, of all the batch's, that lies at a
    position, -1 where there is a token; `labels`. Padded on the right as `padded_length` says; each row, or each sample
    of a packed sequence, in zigzag order, as the attention expects.
    """
    batch = pad(batch, padded_length(batch.labels.shape[1], parallel, multiple))
    is_image = batch.input_ids == image_token_id  # [b, s]
    patches = is_image.flatten().cumsum(0).view_as(is_image) - 1
    text = {
        "input_ids": batch.input_ids.masked_fill(is_image, 0),  # `<image>` may lie past the table
        "image_rows": patches.where(is_image, -1),
        "labels": batch.labels,
    }
    lengths = batch.segment_lengths or [batch.labels.shape[1]]
    return {name: _zigzag(tensor, lengths, parallel.context_parallel_size) for name, tensor in text.items()}


def place_images(text: dict[str, Tensor], parallel: Parallel) -> dict[str, Tensor]:
    """What LlavaModel's first stage takes of `shard_sequence`'s part: `input_ids`, `image_positions`, `image_rows`.

    The last only where the part may lack some patches: under context parallelism.
    """
    rows = text["image_rows"]
    is_image = rows >= 0
    placed = {"input_ids": text["input_ids"], "image_positions": find_patches(is_image)}
    return placed if parallel.context_parallel_size == 1 else {**placed, "image_rows": rows[is_image]}


def place_labels(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """What LlavaModel's last stage takes of `shard_sequence`'s part: int64 `labels` and `wanted` [number of labels]."""
    labels = text["labels"]
    wanted = find_positions(labels != IGNORE)
    return {"labels": labels.transpose(0, 1).flatten()[wanted], "wanted": wanted}


def to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """int64 tensors, in one copy that the host does not wait for. A stage between the others may take none."""
    if not tensors:
        return {}
    sizes = [tensor.numel() for tensor in tensors.values()]
    host = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    torch.cat([tensor.flatten() for tensor in tensors.values()], out=host)
    parts = host.to(device, non_blocking=True).split(sizes)
    return {name: part.view_as(tensor) for part, (name, tensor) in zip(parts, tensors.items(), strict=True)}


def pixels_to_device(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 [n, 3, h, w], without waiting: what a loader's workers read is in pinned memory already."""
    if device.type == "cuda" and not pixels.is_pinned():
        pixels = pixels.pin_memory()
    return pixels.to(device, non_blocking=True)


def packed_seq_params(segment_lengths: list[int] | None, borders: Tensor | None = None) -> PackedSeqParams | None:
    """Where the samples of a packed sequence begin and end, before it is sharded; None: it is not packed.

    `borders`: `find_borders`' where they are to lie on the device, as Transformer Engine wants them.
    """
    if segment_lengths is None:
        return None
    borders = (find_borders(segment_lengths) if borders is None else borders).int()
    longest = max(segment_lengths)
    # The padding belongs to the sample before it, so that there is one list of borders.
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def find_borders(segment_lengths: list[int]) -> Tensor:
    """Where each segment begins, and the end: int64 [segments + 1]."""
    return torch.tensor([0, *itertools.accumulate(segment_lengths)])


def count(batch: Batch, num_labels: int) -> dict[str, int]:
    """What the last stage counts in a padded batch, by its name in `Totals`; `num_labels` are this rank's."""
    is_label = batch.labels != IGNORE  # [b, s]
    size, length = is_label.shape
    lengths = batch.segment_lengths or [length]
    # Positions after the last label of each row or segment.
    padding = sum(int(part.flip(1).int().argmax(dim=1).sum()) for part in is_label.split(lengths, dim=1))
    counts = {
        "num_samples": len(batch.keys),
        "num_tokens": size * length - padding,
        "num_positions": size * length,
        "num_pairs": size * sum(length**2 for length in lengths),
        "num_images": len(batch.pixels),
        "num_truncated": batch.num_truncated,
    }
    # Context-parallel ranks have labels of their own and samples in common.
    is_first = parallel_state.get_context_parallel_rank() == 0
    return {"num_labels": num_labels, **{name: number * is_first for name, number in counts.items()}}


def _zigzag(text: Tensor, lengths: list[int], size: int) -> Tensor:
    """This context-parallel rank's two of 2 * size pieces of each segment: [b, s] -> [b, s / size]."""
    if size == 1:
        return text
    rank = parallel_state.get_context_parallel_rank()
    pieces = [segment.chunk(2 * size, dim=1) for segment in text.split(lengths, dim=1)]
    return torch.cat([part for segment in pieces for part in (segment[rank], segment[-1 - rank])], dim=1)
