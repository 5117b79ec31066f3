"""What the model in training says to a few images: greedy captions of validation samples, at any parallel sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_patch.config.train import Config
from megatron_patch.data.images import normalize
from megatron_patch.data.loader import valid_loader
from megatron_patch.data.preprocessor import read_image_settings
from megatron_patch.data.task_encoder import Batch, LlavaTaskEncoder
from megatron_patch.data.tokenize import IGNORE
from megatron_patch.families.sizes import Llava
from megatron_patch.model import groups
from megatron_patch.model.llava import DTYPES, find_positions
from megatron_patch.model.specs import FP8_MULTIPLE
from megatron_patch.training.batch import place_images, shard_sequence, to_device

MAX_NEW_TOKENS = 32
"""A longer caption is truncated."""


@dataclass(frozen=True)
class Caption:
    """A sample's image and what is said to it."""

    key: str
    """The sample's key in the dataset."""
    image: Tensor | None
    """uint8 [3, h, w] as the vision tower gets it, several side by side; None for a text without images."""
    reference: str
    """The sample's (first) answer."""
    said: str
    """The model's."""


def captioner(config: Config, llava: Llava) -> Callable[[list[DistributedDataParallel]], list[Caption]]:
    """A function that captions the first `--log-captions` samples of the val split with the model's chunks.

    All ranks call it, and all do the same: it is no more work than if the other data-parallel ranks waited. There is no
    cache of keys and values: each token is a forward pass over whole sequences, on megatron.core's own schedule. So it
    works at every parallelism that training works at.
    """
    count = config.training.log_captions if config.validates else 0
    if count == 0:
        return lambda chunks: []
    # At the first validation: a run that does not come to one reads no samples.
    make = functools.cache(lambda: _captioner(config, llava, count))
    return lambda chunks: make()(chunks)


def _captioner(config: Config, llava: Llava, count: int) -> Callable[[list[DistributedDataParallel]], list[Caption]]:
    encoder = LlavaTaskEncoder(config, llava)
    ((_, _), (answer, _)) = encoder.prompt.pieces([("question", "answer")])
    ends = torch.tensor(sorted({encoder.tokenizer(answer).input_ids[-1], encoder.tokenizer.eos_token_id} - {None}))
    samples = _first_samples(config, llava, count)
    prompts, references = zip(*map(_prompt_and_answer, samples), strict=True)
    # Only the images that stand before the first answer.
    num_images = [int((prompt == llava.image_token_id).sum()) // llava.vision.num_image_tokens for prompt in prompts]
    images = [sample.pixels[:num] for sample, num in zip(samples, num_images, strict=True)]  # [n, 3, h, w] each
    next_tokens = _next_tokens(config, llava, torch.cat(images))

    def caption(chunks: list[DistributedDataParallel]) -> list[Caption]:
        """Caption each sample with the model as it is now."""
        with evaluating(chunks):
            answers = _generate(config, prompts, ends, lambda *text: next_tokens(chunks, *text))
        return [
            Caption(
                key=sample.keys[0],
                image=torch.cat(list(pixels), dim=2) if len(pixels) else None,
                reference=_decode(encoder.tokenizer, reference),
                said=_decode(encoder.tokenizer, answer),
            )
            for sample, pixels, reference, answer in zip(samples, images, references, answers, strict=True)
        ]

    return caption


@contextmanager
def evaluating(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """The model without gradients, and without what is done for them: recomputation, offloading."""
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        yield
    for chunk in chunks:
        chunk.train()


def _first_samples(config: Config, llava: Llava, count: int) -> list[Batch]:
    """The val split's first samples as batches of one, read by every rank for itself. Fewer where there are fewer."""
    data = replace(config.data, micro_batch_size=1, num_workers=0, packing_buffer_size=0)
    batches = iter(valid_loader(replace(config, data=data), llava, rank=0, world_size=1))
    samples = {batch.keys[0]: batch for batch in islice(batches, count)}  # the split starts over at its end
    batches.close()
    return list(samples.values())


def _prompt_and_answer(sample: Batch) -> tuple[Tensor, Tensor]:
    """Everything up to the first answer, images as placeholders, and that answer: int64 [s] each."""
    labels = sample.labels[0]  # [s], shifted: each is the id that follows
    labelled = (labels != IGNORE).nonzero().flatten()
    first = int(labelled[0])
    length = int((labelled == first + torch.arange(len(labelled))).sum())
    return sample.input_ids[0, : first + 1], labels[first : first + length]


def _generate(
    config: Config, prompts: tuple[Tensor, ...], ends: Tensor, next_tokens: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """The answer to each prompt up to one of `ends`, int64 [s] each; `next_tokens`: (input_ids, lengths) -> ids [b]."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # [b]
    longest = min(int(lengths.max()) + MAX_NEW_TOKENS, config.model.decoder_seq_length)
    multiple = config.parallel.sequence_multiple * _multiple(config)
    input_ids = torch.zeros(len(prompts), -(-longest // multiple) * multiple, dtype=torch.int64)  # [b, s]
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)] = prompt
    answers = [[] for _ in prompts]
    is_going_on = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(MAX_NEW_TOKENS):
        tokens = next_tokens(input_ids, lengths)  # [b]
        is_going_on &= ~torch.isin(tokens, ends)
        for row in is_going_on.nonzero().flatten():
            answers[row].append(tokens[row])
        is_going_on &= lengths < longest
        if not is_going_on.any():
            break
        input_ids[is_going_on, lengths[is_going_on]] = tokens[is_going_on]
        lengths += is_going_on
    return [torch.tensor(answer, dtype=torch.int64) for answer in answers]


def _multiple(config: Config) -> int:
    """What the number of tokens on a rank is a multiple of: fp8's kernels ask for it in evaluation too."""
    return FP8_MULTIPLE if config.model.precision == "fp8" else 1


def _next_tokens(
    config: Config, llava: Llava, pixels: Tensor
) -> Callable[[list[DistributedDataParallel], Tensor, Tensor], Tensor]:
    """A function (chunks, input_ids [b, s], lengths [b]) -> the likeliest next ids [b], the same on all ranks."""
    image, schedule = read_image_settings(config.model.description), get_forward_backward_func()
    pixel_values = normalize(pixels.to(groups.device()), image.mean, image.std, DTYPES[config.model.precision])
    # The interleaved pipeline needs as many micro batches as stages: it computes the same one again.
    parallel = config.parallel
    num_micro_batches = (
        parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size > 1 else 1
    )

    def next_tokens(chunks: list[DistributedDataParallel], input_ids: Tensor, lengths: Tensor) -> Tensor:
        """The likeliest token after each text, int64 [b]."""
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        # Context parallelism deals out sequences: the positions go along in the place of labels.
        batch = Batch(keys=[], input_ids=input_ids, labels=positions, pixels=pixels)
        text = shard_sequence(batch, llava.image_token_id, parallel, _multiple(config))
        last = find_positions(text["labels"] == (lengths - 1).unsqueeze(1))  # those that are on this rank
        inputs = to_device({**place_images(text, parallel), "wanted": last}, groups.device())
        outputs = schedule(
            forward_step_func=lambda _, chunk: (chunk(pixel_values=pixel_values, **inputs), None),
            data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=num_micro_batches,
            seq_length=parallel.context_parallel_size * text["labels"].shape[1],
            micro_batch_size=len(input_ids),
            forward_only=True,
        )
        likeliest = torch.full(lengths.shape, -1, device=groups.device())  # [b]
        if parallel_state.is_pipeline_last_stage():
            rows = inputs["wanted"] % len(input_ids)  # in the order of the logits
            logits = gather_from_tensor_model_parallel_region(outputs[0])  # [rows, vocabulary]
            # No token of the vocabulary, and there is no image for it.
            logits[:, llava.image_token_id :][:, :1] = float("-inf")
            likeliest[rows] = logits.argmax(dim=-1)
            dist.all_reduce(likeliest, dist.ReduceOp.MAX, parallel_state.get_context_parallel_group())
        dist.broadcast(
            likeliest,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        return likeliest.cpu()

    return next_tokens


def _decode(tokenizer: Any, ids: Tensor) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()
