"""What the ranks of a run need in memory, from its settings alone: arithmetic, without torch.

Weights, gradients and optimizer states are counted exactly, as megatron.core's DistributedDataParallel and
DistributedOptimizer lay them out; activations as `activations.py` says. Not counted: what lives for one operation
(except the logits), the allocator's fragments, communication's buffers, the CUDA context.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_patch.config.train import Config
from megatron_patch.estimate.activations import ELEMENT, FP32, activations
from megatron_patch.families.llava import pipeline_copies, rows
from megatron_patch.families.sizes import Llava
from megatron_patch.families.stages import LANGUAGE_LAYER, is_before_layers
from megatron_patch.families.table import Weight

GIB = 2**30
BUCKET = 40_000_000
"""Elements of a bucket of overlapped gradients, with few data-parallel ranks (distributed_data_parallel.py:63)."""

STATE = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
"""Bytes of a moment's element in the precision-aware optimizer."""

# The order in which modules register their weights, which is the (reversed) order in the buffers.
PARTS = ("vision_model.", "vision_projection.", "language_model.embedding.", "language_model.decoder.layers.")
PARTS += ("language_model.decoder.", "language_model.output_layer.")
WITHIN = ("class_token", "ln_pre", "conv1", "position_embeddings", "input_layernorm", "linear_proj", "linear_qkv")
WITHIN += ("pre_mlp_layernorm", "linear_fc1", "linear_fc2", "")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that the rank of a pipeline stage needs which needs most."""

    parameters: int
    fp8_copies: int
    """With fp8, of the weights that are multiplied in it (Transformer Engine keeps them beside the 16-bit ones)."""

    gradients: int
    optimizer: int
    activations: int
    """Kept between forward and backward, of all micro batches on their way."""

    working: int
    """For the time of one layer: what is recomputed or fetched of it; or the logits and their fp32 copy; or what the
    optimizer's step takes beyond the activations' room."""

    on_cpu: int
    """Besides, in the CPU's memory: what is offloaded. (Of Adam's 16 bytes a weight half is pinned, in powers of two,
    and takes more.)"""

    saving: int
    """Besides, in the CPU's memory while a checkpoint is written: this rank's share. To read one takes less."""

    @property
    def total(self) -> int:
        """On the device."""
        states = self.parameters + self.fp8_copies + self.gradients + self.optimizer
        return states + self.activations + self.working


def plan(
    config: Config, llava: Llava, world_size: int, fused_norm: bool = True, fraction: float | None = None
) -> list[Memory]:
    """The memory of each pipeline stage, with `world_size` processes.

    `fused_norm`: as on a GPU; torch's norm on a CPU keeps more. `fraction`: of the optimizer states that is on the CPU;
    None: as the settings say, with 0 for auto.
    """
    if fraction is None:
        fraction = 1.0 if config.optimizer.optimizer_offload == "static" else 0.0
    data_parallel_size = world_size // config.parallel.model_parallel_size
    micro_batches = config.data.num_micro_batches(config.parallel, world_size)
    return [
        _stage(config, llava, stage, data_parallel_size, micro_batches, fused_norm, fraction)
        for stage in range(config.parallel.pipeline_model_parallel_size)
    ]


def offload_fraction(memory: Memory, free: int) -> float:
    """Which part of the optimizer states finds no room in `free` bytes, 0 to 1, once weights and gradients are there.

    A tenth of it is left for what is not counted.
    """
    room = 0.9 * free - memory.fp8_copies - memory.activations - memory.working
    return min(1.0, max(0.0, 1 - room / memory.optimizer)) if memory.optimizer else 0.0


def optimizer_bytes(config: Config) -> int:
    """What the optimizer keeps on the device of a weight that it steps.

    Adam's two moments; with 16-bit weights also their fp32 copy. Transformer Engine's precision-aware FusedAdam
    (fused_adam.py) keeps of that the 16 bits that a bf16 weight lacks, and a whole copy of other weights, fp32 too.
    """
    precision, settings = config.model.precision, config.optimizer
    if not settings.use_precision_aware_optimizer:
        return 8 if ELEMENT[precision] == FP32 else 12
    moments = STATE[settings.exp_avg_dtype] + STATE[settings.exp_avg_sq_dtype]
    return moments + (2 if precision in ("bf16", "fp8") else FP32)


def memory_report(config: Config, llava: Llava, world_size: int) -> str:
    """The memory as a table in GiB, a line per pipeline stage."""
    labels = config.model.decoder_seq_length - llava.vision.num_image_tokens
    lines = [
        f"memory of a rank in GiB (2^30 bytes), {config.data.micro_batch_size} x {config.model.decoder_seq_length} "
        f"tokens per micro batch, {labels} labels in each sequence:",
        f"{'stage':>5} {'parameters':>11} {'gradients':>11} {'optimizer':>11} {'activations':>11} {'working':>11} "
        f"{'total':>11} {'on the CPU':>11} {'to save':>11}",
    ]
    for stage, memory in enumerate(plan(config, llava, world_size)):
        parts = (memory.parameters + memory.fp8_copies, memory.gradients, memory.optimizer)
        parts += (memory.activations, memory.working, memory.total, memory.on_cpu, memory.saving)
        lines.append(f"{stage:>5} " + " ".join(f"{part / GIB:>11.3f}" for part in parts))
    if config.optimizer.optimizer_offload == "auto":
        lines.append(
            "--optimizer-offload auto: as much of the optimizer as does not fit goes to the CPU; above, nothing"
        )
    return "\n".join(lines)


def _stage(
    config: Config,
    llava: Llava,
    stage: int,
    data_parallel_size: int,
    micro_batches: int,
    fused_norm: bool,
    fraction: float,
) -> Memory:
    size = ELEMENT[config.model.precision]
    parameters = copies = gradients = states = saved = 0
    for chunk in range(config.parallel.virtual_pipeline_model_parallel_size):
        weights = list(chunk_weights(config, llava, stage, chunk))
        trained = [numel for _, numel, is_trained in weights if is_trained]
        frozen = sum(numel for _, numel, is_trained in weights if not is_trained)
        copies += sum(numel * _fp8_copies(config, name, is_trained) for name, numel, is_trained in weights)
        held, owned = sum(trained), sum(trained)
        if config.parallel.use_distributed_optimizer and trained:
            ranks = data_parallel_size * config.parallel.context_parallel_size
            overlapped = config.parallel.overlap_grad_reduce and stage == chunk == 0
            held, owned = _buffer(trained, ranks, max(BUCKET, 10**6 * data_parallel_size) if overlapped else None)
        parameters += size * (held + frozen)
        saved += 3 * FP32 * sum(trained) + size * (sum(trained) + frozen)  # fp32 weights and moments; weights
        gradients += 4 * held
        states += owned
    optimizer = round(states * (1 - fraction)) * optimizer_bytes(config)
    # Offloaded: Adam's two moments, the fp32 weight and the gradient.
    on_cpu = round(states * fraction) * 16

    kept, working = activations(config, llava, stage, micro_batches, fused_norm)
    if config.training.recompute == "offload":
        on_cpu, kept = on_cpu + kept, 0
    if config.optimizer.use_precision_aware_optimizer:
        # FusedAdam.step takes a fp32 copy of every moment that is kept in fewer bits, of all weights at once.
        moments = (config.optimizer.exp_avg_dtype, config.optimizer.exp_avg_sq_dtype)
        working = max(working, FP32 * states * sum(moment != "fp32" for moment in moments) - kept)
    return Memory(
        parameters=parameters,
        fp8_copies=copies,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        working=working,
        on_cpu=on_cpu,
        saving=saved // (data_parallel_size * config.parallel.context_parallel_size),
    )


def chunk_weights(config: Config, llava: Llava, stage: int, chunk: int) -> Iterator[tuple[str, int, bool]]:
    """Each weight of a (virtual) stage on one tensor-parallel rank: name, elements, whether it is trained."""
    parallel = config.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    count = parallel.num_layers_per_chunk(llava)
    first = chunk * stages + stage
    layers = range(first * count, (first + 1) * count)
    is_first, is_last = first == 0, first == stages * chunks - 1
    for name, numel, layer, at_start in _weights(llava, parallel.tensor_model_parallel_size, stages > 1):
        if layer in layers if layer is not None else is_first if at_start else is_last:
            yield name, numel, config.model.trains(name)


@functools.lru_cache(maxsize=16)
def _weights(llava: Llava, tensor_parallel_size: int, has_stages: bool) -> list[tuple[str, int, int | None, bool]]:
    """All weights in their order: name, elements on a rank, layer, whether it is before the layers and not after.

    Listed once for all stages and all settings that a plan compares.
    """
    table = {weight.mcore: weight for weight in rows(llava)}
    if has_stages:
        table |= {copy: table[original] for copy, original in pipeline_copies(llava).items()}
    listed = []
    for name in sorted(table, key=_registered):
        match = LANGUAGE_LAYER.fullmatch(name)
        layer = int(match[2]) if match else None
        listed.append((name, _numel(table[name], llava, tensor_parallel_size), layer, is_before_layers(name)))
    return listed


def _fp8_copies(config: Config, name: str, is_trained: bool) -> int:
    """Bytes of each element of a weight that Transformer Engine keeps in fp8, until Blackwell.

    The weight, and for its input's gradient its transpose (float8_tensor_storage.py). Where the input needs no
    gradient, te.Linear does without the transpose (linear.py), te.LayerNormLinear does not (layernorm_linear.py).
    """
    is_layer = name.startswith(("language_model.decoder.layers.", "vision_model.decoder.layers."))
    if config.model.precision != "fp8" or not is_layer or not re.search(r"linear_\w+\.weight$", name):
        return 0
    needs_gradient = is_trained or name.startswith("language_model.")
    return 2 if needs_gradient or re.search(r"linear_(qkv|fc1)", name) else 1


def _registered(name: str) -> tuple[int, int, int, bool]:
    part = next(index for index, prefix in enumerate(PARTS) if name.startswith(prefix))
    number = re.search(r"layers\.(\d+)\.", name)
    within = next(index for index, word in enumerate(WITHIN) if word in name)
    return part, int(number[1]) if number else -1, within, name.endswith("bias")


def _numel(weight: Weight, llava: Llava, tensor_parallel_size: int) -> int:
    shape = list(weight.shape)
    if weight.layout == "vocab":
        shape[0] = llava.language.padded_vocab_size(tensor_parallel_size)
    return math.prod(shape) // (tensor_parallel_size if weight.axis is not None else 1)


def _buffer(trained: list[int], ranks: int, bucket: int | None) -> tuple[int, int]:
    """Elements of the buffer of a distributed optimizer, and of the weights in it those that one rank steps, at most.

    param_and_grad_buffer.py:664-741: weights begin at multiples of 64, buckets end at ones of 128 and of the ranks.
    """
    multiple = math.lcm(ranks, 128)
    spans, buckets, start, bucket_start = [], [], 0, 0
    for number, numel in enumerate(reversed(trained), start=1):
        start = _up(start, 64)
        spans.append((start, start + numel))
        start += numel
        if number == len(trained) or (bucket is not None and start - bucket_start >= bucket):
            start = _up(start, multiple)
            buckets.append((bucket_start, start))
            bucket_start = start
    owned = [0] * ranks
    for first, last in buckets:
        length = (last - first) // ranks
        for begin, end in spans:
            if begin < last and end > first:
                for rank in range((begin - first) // length, (end - 1 - first) // length + 1):
                    shard = first + rank * length
                    owned[rank] += min(end, shard + length) - max(begin, shard)
    return start, max(owned)


def _up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple
