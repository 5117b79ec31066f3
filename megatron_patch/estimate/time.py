"""How long a training iteration takes on GPUs: a prediction from a run's settings by arithmetic, without torch.

A micro batch takes a rank as long as its GPU computes, communicates and stands idle after the CPU waited for it, or as
long as its CPU launches kernels, whichever is longer; the slowest pipeline stage counts. Samples are as long as
LLaVA-Pretrain's. The kernels are those of megatron.core's local layers as this package builds them; Transformer
Engine's are taken to be as fast. The prediction has not been compared with a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_patch.config.train import Config
from megatron_patch.estimate.activations import ELEMENT, FP32, activations
from megatron_patch.estimate.cards import (
    ATTENTION_LAUNCHES,
    ATTENTION_SHARE,
    COLLECTIVE,
    COPY_SHARE,
    FP8_GAIN,
    FULL,
    HOST,
    KERNELS,
    LATENCY,
    LAUNCH,
    NETWORK,
    NODE,
    OTHER_LAUNCHES,
    PCIE,
    SCORE_BYTES,
    SYNC,
    TILE,
    VISION_LAUNCHES,
    VISION_ROWS,
    Card,
    Kernels,
)
from megatron_patch.estimate.flops import Work, step_flops
from megatron_patch.estimate.memory import Memory, optimizer_bytes, plan
from megatron_patch.families.sizes import Llava

TOKENS, LABELS = 48, 30
"""Beside its image, a sample of LLaVA-Pretrain has so many tokens, padding included; so many of them are labels."""
FP8_TOKENS = 16
"""Tokens per rank that fp8 pads a sequence to a multiple of (model/specs.py)."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """What is predicted of a run. The first four are seconds of one micro batch, of the slowest stage's rank."""

    compute: float
    """The GPU's kernels."""
    communication: float
    """The GPU's collectives."""
    launches: float
    """The CPU: kernels and collectives launched, the micro batch handed over."""
    idle: float
    """The GPU's, where the CPU waited for it."""
    iteration: float
    """Seconds of an iteration: micro batches, pipeline bubble, gradients' reduction, optimizer."""
    samples: float
    """Per second, over all GPUs."""
    flops: float
    """FLOP/s per GPU of what is computed, as `step_flops` counts."""
    share: float
    """`flops` / the peak."""

    @property
    def bound(self) -> str:
        """What an iteration's time follows from."""
        if self.launches > self.compute + self.communication + self.idle:
            return "launches"
        return "GPU" if self.compute > self.communication else "communication"


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A micro batch."""

    tokens: int
    """Of one context-parallel rank."""
    pairs: float
    """Of tokens that attention compares on one context-parallel rank."""
    work: Work
    """Of all context-parallel ranks."""


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """Seconds of one micro batch on a rank of a pipeline stage; the names are those of `Time`."""

    compute: float
    communication: float
    launches: float
    idle: float

    @property
    def seconds(self) -> float:
        return max(self.compute + self.communication + self.idle, self.launches)


def predict(config: Config, llava: Llava, world_size: int, card: Card, kernels: Kernels = KERNELS) -> Time:
    """The time of an iteration on `world_size` GPUs."""
    parallel, data = config.parallel, config.data
    micro_batches = data.num_micro_batches(parallel, world_size)
    batch = _micro_batch(config, llava)
    memories = plan(config, llava, world_size, fraction=0.0)
    stages = [_stage(config, llava, stage, batch, card, kernels, memory) for stage, memory in enumerate(memories)]
    slowest = max(stages, key=lambda stage: stage.seconds)
    bubble = (len(stages) - 1) / parallel.virtual_pipeline_model_parallel_size
    iteration = (micro_batches + bubble) * slowest.seconds
    iteration += max(_step_seconds(config, memory, world_size, card, slowest.seconds) for memory in memories)
    replicas = world_size // parallel.model_parallel_size
    flops = sum(step_flops(llava, config.model, batch.work).values()) * micro_batches * replicas
    flops /= iteration * world_size
    return Time(
        compute=slowest.compute,
        communication=slowest.communication,
        launches=slowest.launches,
        idle=slowest.idle,
        iteration=iteration,
        samples=batch.work.num_images * micro_batches * replicas / iteration,
        flops=flops,
        share=flops / (card.peak_fp32 if config.model.precision == "fp32" else card.peak),
    )


def matmul_seconds(card: Card, rate: float, m: int, n: int, k: int, size: int) -> float:
    """[m, k] x [k, n] of elements of `size` bytes, at `rate` FLOP/s while every SM is at work.

    The output is computed in tiles, as many at once as there are SMs; the last of these waves takes as long as a full
    one. A product cannot be faster than its matrices are read and written.
    """
    waves = math.ceil(math.ceil(m / TILE) * math.ceil(n / TILE) / card.num_sms)
    computed = 2 * k * TILE**2 * card.num_sms * waves
    return max(computed / rate, size * (m * k + k * n + m * n) / card.copy)


def _micro_batch(config: Config, llava: Llava) -> _Batch:
    parallel, limit, image = config.parallel, config.model.decoder_seq_length, llava.vision.num_image_tokens
    sample = min(image + TOKENS, limit)
    each = max(1, limit // sample) if config.data.packs else 1
    multiple = parallel.sequence_multiple * (FP8_TOKENS if config.model.precision == "fp8" else 1)
    length = math.ceil((limit if config.data.packs else sample) / multiple) * multiple
    sequences, ranks = config.data.micro_batch_size, parallel.context_parallel_size
    work = Work(
        num_positions=sequences * length,
        num_pairs=sequences * (each * sample**2 if config.data.packs else length**2),
        num_images=sequences * each,
        num_labels=sequences * each * min(LABELS, sample - image),
    )
    return _Batch(tokens=work.num_positions // ranks, pairs=work.num_pairs / ranks, work=work)


def _stage(
    config: Config, llava: Llava, stage: int, batch: _Batch, card: Card, kernels: Kernels, memory: Memory
) -> _Stage:
    """One micro batch on a rank of pipeline stage `stage`."""
    parallel, training = config.parallel, config.training
    stages = parallel.pipeline_model_parallel_size
    layers = llava.language.num_layers // stages
    again = 1.0 if training.recompute_granularity == "full" else 0.0
    if training.recompute_method == "block":
        again = (training.recompute_num_layers or 1) / parallel.num_layers_per_chunk(llava)
    compute = layers * _language_layer(config, llava, batch, card, kernels, again)
    compute += kernels.gradient_bytes * memory.gradients / 4 / card.copy
    launched = OTHER_LAUNCHES + layers * ((1 + again) * kernels.launches[0] + kernels.launches[1])
    if training.recompute_granularity == "selective":
        launched += layers * ATTENTION_LAUNCHES
    calls, communication = _layer_collectives(config, llava, batch, card, again)
    calls, communication = layers * calls, layers * communication
    idle = kernels.syncs * SYNC
    if stage == 0:
        seen, vision_launched, vision_calls, vision_communication = _vision(config, llava, batch, card)
        if kernels.syncs:
            # The tower is launched while the GPU has nothing else to do.
            launching = vision_launched * LAUNCH + vision_calls * COLLECTIVE
            idle += max(0.0, launching - seen - vision_communication)
        compute, launched = compute + seen, launched + vision_launched
        calls, communication = calls + vision_calls, communication + vision_communication
    if stage == stages - 1:
        compute += _vocabulary(config, llava, batch, card)
    if stages > 1:
        # Hidden states and their gradients, from and to the neighbours.
        sent = batch.tokens * llava.language.hidden_size * ELEMENT[config.model.precision]
        sent //= parallel.tensor_model_parallel_size if parallel.uses_sequence_parallel else 1
        link = card.link if parallel.model_parallel_size <= NODE else NETWORK
        calls, communication = calls + 2, communication + 2 * (LATENCY + sent / link)
    if training.recompute == "offload":
        # There and back, beside the computation. The plan's sequences are longer.
        planned = config.data.micro_batch_size * config.model.decoder_seq_length / parallel.context_parallel_size
        kept = activations(config, llava, stage, 1)[0] * batch.tokens / planned
        communication += max(0.0, 2 * kept / PCIE - compute)
    shared = parallel.tensor_model_parallel_size * parallel.context_parallel_size > 1
    launches = launched * LAUNCH + calls * COLLECTIVE + shared * kernels.handover
    return _Stage(compute=compute, communication=communication, launches=launches, idle=idle)


def _language_layer(config: Config, llava: Llava, batch: _Batch, card: Card, kernels: Kernels, again: float) -> float:
    """Seconds of the GPU for a layer of the language model, forward and backward; a part `again` of it once more."""
    model, parallel, t = llava.language, config.parallel, batch.tokens
    tp, w = parallel.tensor_model_parallel_size, ELEMENT[config.model.precision]
    h, f = model.hidden_size, model.ffn_hidden_size // tp
    query = model.num_attention_heads * model.kv_channels // tp
    groups = model.num_query_groups * model.kv_channels // tp
    gain = FP8_GAIN if config.model.precision == "fp8" else 1.0
    forward = backward = 0.0
    for outputs, inputs in ((query + 2 * groups, h), (h, query), ((1 + model.family.is_gated) * f, h), (h, f)):
        once, gradients = _linear(config, card, t, outputs, inputs, trained=config.model.trains("language_model"))
        forward, backward = forward + once / gain, backward + gradients / gain

    between = h / tp if parallel.uses_sequence_parallel else h
    norms_and_sums = (10 * between, 12 * between)
    rows = [
        norms_and_sums[index] + kernels.rope[index] * (query + groups) + kernels.swiglu[index] * f for index in (0, 1)
    ]
    rows[1] += 2 * (query + 2 * groups)  # the gradients of queries, keys and values are put together
    forward += rows[0] * t * w / (COPY_SHARE * card.copy)
    backward += rows[1] * t * w / (COPY_SHARE * card.copy)

    share = 0.5 if config.model.use_flash_attn else 1.0
    attention = share * 4 * query * batch.pairs / (ATTENTION_SHARE * card.peak)
    if not config.model.use_flash_attn:
        scores = batch.pairs * model.num_attention_heads // tp
        attention += scores * SCORE_BYTES / 3 / (COPY_SHARE * card.copy)
    selective = config.training.recompute_granularity == "selective"
    return (1 + again) * (forward + attention) + backward + (2 + selective) * attention


def _linear(config: Config, card: Card, tokens: int, outputs: int, inputs: int, trained: bool) -> tuple[float, float]:
    """Seconds of a linear layer: forward; its input's gradient and, where it is trained, its weight's."""
    w, is_fp32 = ELEMENT[config.model.precision], config.model.precision == "fp32"
    rate = FULL * card.peak_fp32 if is_fp32 else card.matmul
    forward = matmul_seconds(card, rate, tokens, outputs, inputs, w)
    backward = matmul_seconds(card, rate, tokens, inputs, outputs, w)
    if trained:
        backward += matmul_seconds(card, rate, outputs, inputs, tokens, w)
    return forward, backward


def _layer_collectives(config: Config, llava: Llava, batch: _Batch, card: Card, again: float) -> tuple[float, float]:
    """Collectives of a layer of the language model, forward and backward, and the seconds that they take the GPU."""
    model, parallel, w = llava.language, config.parallel, ELEMENT[config.model.precision]
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    calls = seconds = 0.0
    if tp > 1:
        hidden = batch.tokens * model.hidden_size * w * (tp - 1) / tp
        # Gathered in front of qkv and fc1, reduced and scattered after proj and fc2; the other way round in the
        # backward pass, which gathers the inputs of trained weights once more. Or all-reduced: twice the bytes.
        forward, backward, times = (
            (4, 4 + 2 * config.model.trains("language_model"), 1) if parallel.uses_sequence_parallel else (2, 2, 2)
        )
        calls += (1 + again) * forward + backward
        seconds += calls * _collective(card, times * hidden, tp)
    if cp > 1:
        # Keys and values are gathered; their gradients are reduced and scattered.
        groups = batch.tokens * model.num_query_groups * model.kv_channels // tp * w * (cp - 1)
        selective = config.training.recompute_granularity == "selective"
        gathers = 2 * (2 + max(again, selective))
        calls += gathers
        seconds += gathers * _collective(card, groups, tp * cp)
    return calls, seconds


def _collective(card: Card, num_bytes: float, ranks: int) -> float:
    """Seconds of a collective that moves so many bytes to each rank, over `ranks` GPUs in a row."""
    return LATENCY + num_bytes / (card.link if ranks <= NODE else NETWORK)


def _vision(config: Config, llava: Llava, batch: _Batch, card: Card) -> tuple[float, int, int, float]:
    """Tower and projector: seconds of the GPU's kernels, kernels, collectives, their seconds."""
    model, h = llava.vision, llava.language.hidden_size
    tp, w = config.parallel.tensor_model_parallel_size, ELEMENT[config.model.precision]
    trained, images = config.model.trains("vision_model"), batch.work.num_images
    t = images * model.num_positions
    forward = backward = 0.0
    width, f = model.hidden_size, model.ffn_hidden_size // tp
    for outputs, inputs in ((3 * width // tp, width), (width, width // tp), (f, width), (width, f)):
        once, gradients = _linear(config, card, t, outputs, inputs, trained)
        forward, backward = forward + once, backward + gradients
    attention = 4 * model.num_positions * t * width / tp / (ATTENTION_SHARE * card.peak)
    rows = VISION_ROWS * width * t * w / (COPY_SHARE * card.copy)
    forward, backward = forward + attention + rows, backward + 2 * attention + 1.5 * rows
    again = trained and config.training.recompute_granularity == "full"
    seconds = model.num_layers * ((1 + again) * forward + trained * backward)
    for outputs, inputs in ((h // tp, model.hidden_size), (h, h // tp)):
        seconds += sum(_linear(config, card, images * model.num_image_tokens, outputs, inputs, trained=True))
    launched = model.num_layers * ((1 + again) * VISION_LAUNCHES[0] + trained * VISION_LAUNCHES[1])
    calls = model.num_layers * 2 * (1 + again + trained) + 2 if tp > 1 else 0
    return seconds, launched, calls, calls * _collective(card, 2 * t * model.hidden_size * w * (tp - 1) / tp, tp)


def _vocabulary(config: Config, llava: Llava, batch: _Batch, card: Card) -> float:
    """Seconds of the GPU for logits and loss, forward and backward."""
    tp, labels = config.parallel.tensor_model_parallel_size, batch.work.num_labels
    vocab_size = llava.language.padded_vocab_size(tp) // tp
    linear = _linear(
        config, card, labels, vocab_size, llava.language.hidden_size, config.model.trains("language_model")
    )
    return sum(linear) + 10 * labels * vocab_size * 4 / card.copy  # fp32 logits: cast, maximum, exponent, sum, gradient


def _step_seconds(config: Config, memory: Memory, world_size: int, card: Card, micro_batch: float) -> float:
    """Seconds between the last micro batch and the next iteration: gradients reduced, weights stepped and gathered.

    `memory`: of a stage, nothing offloaded. `micro_batch`: seconds of one, behind which an overlapped reduction hides.
    """
    parallel, size, of_each = config.parallel, ELEMENT[config.model.precision], optimizer_bytes(config)
    held, owned = memory.gradients // 4, memory.optimizer // of_each
    ranks = world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    reduced = gathered = 0.0
    if ranks > 1:
        link = card.link if world_size // parallel.pipeline_model_parallel_size <= NODE else NETWORK
        times = (ranks - 1) / ranks / link
        reduced = 4 * held * times * (1 if parallel.use_distributed_optimizer else 2)
        gathered = size * held * times * parallel.use_distributed_optimizer
        reduced = max(0.0, reduced - parallel.overlap_grad_reduce * micro_batch)
        gathered = max(0.0, gathered - parallel.overlap_param_gather * micro_batch)
    # Gradients: zeroed, read for their norm, scaled. States: read and written. Weights: written from their fp32 copies.
    moved = held * (4 + size) + owned * (4 + 8 + 4 + 2 * of_each + (6 if size < FP32 else 0))
    seconds = moved / (COPY_SHARE * card.copy)
    if config.optimizer.optimizer_offload == "static":
        seconds += owned * (8 / PCIE + 28 / HOST)
    return reduced + seconds + gathered
