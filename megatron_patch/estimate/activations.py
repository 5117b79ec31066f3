"""Bytes that autograd keeps of a micro batch between forward and backward: arithmetic, without torch.

For megatron.core's local layers as this package builds them (model/specs.py), sequences of the greatest length with one
image each, and a label at every token. Counted are distinct storages; of masks and indices only the larger ones.
Letters, per rank: t tokens of a micro batch, h hidden size, f feed-forward channels, w bytes of an element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_patch.config.train import Config
from megatron_patch.families.sizes import Llava

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 2}
"""Bytes of a weight and of an activation's element."""
KEPT = {"quick_gelu": 2, "gelu_tanh": 1, "gelu": 1}
"""Tensors that the tower's activation function keeps: its input, and what it made of that on the way."""
FP32 = 4
INT64 = 8


@dataclass(frozen=True)
class Layer:
    """Bytes of one layer."""

    kept: int
    """By autograd, when nothing is recomputed."""

    core: int
    """Of these, what only the core attention keeps: selective recomputation does without."""

    given: int
    """The layer's input, all that is kept of a layer (or a run of layers) that is recomputed as a whole."""


def activations(
    config: Config, llava: Llava, stage: int, micro_batches: int, fused_norm: bool = True
) -> tuple[int, int]:
    """What a rank of pipeline stage `stage` keeps of all micro batches on their way, and what work takes besides.

    On their way are, at most, as many as the schedules start before the first backward pass (1F1B and interleaved:
    arXiv:2104.04473). Besides comes what is recomputed or fetched of a layer, or the logits.
    """
    parallel = config.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    kept, working = _layers(config, language_layer(config, llava, fused_norm), parallel.num_layers_per_chunk(llava))
    if chunks == 1:
        on_their_way = min(micro_batches, stages - stage)
    else:
        on_their_way = min(micro_batches * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)
    total = on_their_way * kept
    if stage == 0:
        seen, most = images(config, llava)
        total += math.ceil(on_their_way / chunks) * seen
        working = max(working, most)
    if stage == stages - 1:
        kept, logits = head(config, llava, fused_norm)
        total += kept  # of one micro batch: its backward pass begins at once
        working = max(working, logits)
    return total, working


def language_layer(config: Config, llava: Llava, fused_norm: bool = True) -> Layer:
    """A layer of the language model."""
    model, tp, w = llava.language, config.parallel.tensor_model_parallel_size, ELEMENT[config.model.precision]
    trained = config.model.trains("language_model")
    length, t = _tokens(config)
    between = t // tp if config.parallel.uses_sequence_parallel else t  # of norms and residuals
    given = between * model.hidden_size * w
    query = t * model.num_attention_heads * model.kv_channels // tp * w
    groups = t * model.num_query_groups * model.kv_channels // tp * w  # of keys, and as much of values
    heads = config.data.micro_batch_size * model.num_attention_heads // tp

    norms = 2 * (_norm(given, trained, fused_norm) + between * FP32)
    if not config.model.use_flash_attn:
        # Keys and values are repeated for each query head; the scores in fp32, and in 16 bits once more.
        core = heads * length * length * (FP32 + (w if w < FP32 else 0))
        repeated = model.num_attention_heads > model.num_query_groups
        attention = 3 * query if repeated else 2 * query + 3 * groups
        output = trained * query
        inputs = query + groups + (query + 2 * groups)
    elif config.parallel.context_parallel_size > 1:
        # Keys and values of the whole sequence, and the two pieces' outputs beside the whole one.
        whole = config.parallel.context_parallel_size * groups
        core, output = heads * length * FP32 + query + 2 * whole, trained * query
        attention = query
        inputs = query + groups + (query + 2 * groups)
    else:
        # Values lie in the output of linear_qkv, which therefore stays.
        core, output = heads * length * FP32 + (not trained) * query, trained * query
        attention = inputs = query + groups + (query + 2 * groups)
    if config.training.recompute_granularity == "selective":
        attention, core = inputs, core + max(0, attention - inputs)
    ffn = t * model.ffn_hidden_size // tp * w
    mlp = (1 + model.family.is_gated + trained) * ffn  # gate and up, their product
    return Layer(kept=norms + attention + core + output + mlp, core=core, given=given)


def vision_layer(config: Config, llava: Llava) -> Layer:
    """A layer of the vision tower; nothing when it is frozen."""
    model, tp, w = llava.vision, config.parallel.tensor_model_parallel_size, ELEMENT[config.model.precision]
    if not config.model.trains("vision_model"):
        return Layer(0, 0, 0)
    length = model.num_positions
    t = config.data.micro_batch_size * length
    given = t * model.hidden_size * w
    heads = config.data.micro_batch_size * model.num_attention_heads // tp
    core = heads * length * FP32
    if not config.model.use_flash_attn:
        core = heads * length * length * (FP32 + (w if w < FP32 else 0))
    norms = 2 * (2 * given + 2 * t * FP32)
    ffn = (KEPT[model.family.activation] + 1) * t * model.ffn_hidden_size // tp * w
    return Layer(kept=norms + 4 * given // tp + core + ffn, core=core, given=given)


def images(config: Config, llava: Llava) -> tuple[int, int]:
    """What tower and projector keep of a micro batch, one image per sample, and what work takes besides."""
    vision, tp, w = llava.vision, config.parallel.tensor_model_parallel_size, ELEMENT[config.model.precision]
    samples = config.data.micro_batch_size
    features = samples * vision.num_positions * vision.hidden_size * w
    hidden = samples * vision.num_image_tokens * llava.language.hidden_size // tp * w
    kept, working = _layers(config, vision_layer(config, llava), vision.num_layers, by_layer=True)
    if config.model.trains("vision_model"):
        kept += samples * 3 * vision.img_size**2 * w + features  # the pixels, and the input of the first norm
    _, t = _tokens(config)
    return kept + features + 2 * hidden + 2 * t * INT64, working


def head(config: Config, llava: Llava, fused_norm: bool = True) -> tuple[int, int]:
    """What the last norm, the projection to the vocabulary and the loss keep; the logits and their fp32 copy."""
    model, tp, w = llava.language, config.parallel.tensor_model_parallel_size, ELEMENT[config.model.precision]
    trained = config.model.trains("language_model")
    _, t = _tokens(config)
    between = t // tp if config.parallel.uses_sequence_parallel else t
    tokens = config.model.decoder_seq_length - llava.vision.num_image_tokens
    labels = config.data.micro_batch_size * tokens // config.parallel.context_parallel_size
    logits = labels * model.padded_vocab_size(tp) // tp
    norm = _norm(between * model.hidden_size * w, trained, fused_norm) - trained * between * model.hidden_size * w
    return norm + trained * labels * model.hidden_size * w + logits * FP32, logits * (w + FP32)


def _tokens(config: Config) -> tuple[int, int]:
    """Length of a sequence on a rank, padded to what ranks share, and tokens of a micro batch."""
    parallel = config.parallel
    padded = math.ceil(config.model.decoder_seq_length / parallel.sequence_multiple) * parallel.sequence_multiple
    length = padded // parallel.context_parallel_size
    return length, config.data.micro_batch_size * length


def _norm(given: int, trained: bool, fused_norm: bool) -> int:
    """RMSNorm's input, and where weights are trained its output; torch's on a CPU keeps the step between too."""
    return given * (1 + trained * (1 if fused_norm else 2))


def _layers(config: Config, layer: Layer, count: int, by_layer: bool = False) -> tuple[int, int]:
    """What `count` layers keep, and what work takes besides."""
    training = config.training
    if training.recompute_granularity == "selective":
        return count * (layer.kept - layer.core), layer.core
    if training.recompute_granularity == "full":
        run = 1 if by_layer else training.recompute_num_layers or 1
        if training.recompute_method == "block" and not by_layer:
            return run * layer.given + (count - run) * layer.kept, layer.kept
        return count // run * layer.given, run * layer.kept
    return count * layer.kept, layer.kept if training.recompute == "offload" else 0
