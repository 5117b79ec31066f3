"""The contest of benchmarks/train.py: training steps of ours, and of a plain PyTorch loop over transformers' LLaVA."""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from megatron_patch import parallel
from megatron_patch.checkpoint.convert import rank_state_dict, to_mcore
from megatron_patch.checkpoint.reader import InMemory
from megatron_patch.checkpoint.stages import Stage
from megatron_patch.config import Checkpoint, Config, Data, Model, Optimizer, Parallel, Training
from megatron_patch.data.image import normalize, read_image_settings
from megatron_patch.data.task_encoder import MULTIPLE, PADDING, Batch
from megatron_patch.data.tokenize import IGNORE
from megatron_patch.families.llava import hub_name, read_config, rows, unused_names
from megatron_patch.families.transformer_engine import to_transformer_engine_name
from megatron_patch.model.llava import DTYPES
from megatron_patch.model.specs import uses_transformer_engine
from megatron_patch.sizes import Llava
from megatron_patch.training.loop import build_model
from megatron_patch.training.optimizer import build_optimizer, build_scheduler, wrap
from megatron_patch.training.step import batch_runner, train_step

Step = Callable[[Batch], float]
"""A training step on one micro batch; returns its loss."""

# Language model: hidden size, feed-forward, layers, heads, query groups. Vision tower: the same without groups.
SIZES = {
    "7B": ((4096, 14336, 32, 32, 8), (1024, 4096, 24, 16)),
    "100M": ((640, 1728, 8, 10, 10), (384, 1536, 12, 6)),
    "tiny": ((64, 128, 2, 4, 2), (32, 64, 3, 2)),
}
VOCABULARY = 32768
IMAGE_TOKEN = VOCABULARY - 1
PATCH, PICTURE = 14, 336
PROMPT = 14
"""Words around a picture: the question and what marks it."""
CAPTION = (15, 45)
"""Fewest and most learned words of a caption: 30 in the mean, as in LLaVA-Pretrain."""
LEARNING_RATE = 1e-3


@dataclass
class Result:
    """One contestant's steps."""

    seconds: list[float] = field(default_factory=list)
    """Of each measured step, of all rounds."""
    cpu_seconds: list[float] = field(default_factory=list)
    """What these steps took of all cores together: on a machine that others use too, the steadier figure."""
    losses: list[float] = field(default_factory=list)
    """Of the last round's steps; each round begins with the same weights."""
    peak_bytes: int = 0
    """Largest memory of tensors on the GPU."""


def machine() -> str:
    """What computes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def contest(config: Config, batches: list[Batch], rounds: int) -> dict[str, Result]:
    """Let each contestant take a step on every batch, alone in memory, and all again in the next round.

    `config`: as `make_config` gives it. The first step of a round is not measured.
    """
    unfused = replace(config, model=replace(config.model, use_flash_attn=False))
    builders = {
        "transformers": lambda: plain_loop(config),
        "ours": lambda: ours(config),
        "ours, unfused attention": lambda: ours(unfused),
    }
    folder = config.model.description
    parallel.start(Parallel(), seed=1, init_method=f"file://{folder}/store", rank=0, world_size=1)
    results = {name: Result() for name in builders}
    for _ in range(rounds):
        for name, build in builders.items():
            run_round(build(), batches, results[name])
            gc.collect()
    parallel.stop()
    return results


def run_round(step: Step, batches: list[Batch], result: Result) -> None:
    """Take the steps of one round and record them."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    result.losses = []
    for index, batch in enumerate(batches):
        start, cpu_start = time.perf_counter(), time.process_time()
        result.losses.append(step(batch))  # which waits for the GPU
        if index > 0:
            result.seconds.append(time.perf_counter() - start)
            result.cpu_seconds.append(time.process_time() - cpu_start)
    if has_gpu:
        result.peak_bytes = torch.cuda.max_memory_allocated()


def write_description(folder: Path, size: str) -> None:
    """config.json and preprocessor_config.json of a Mistral with a CLIP at 336 pixels, in `folder`."""
    (hidden, ffn, layers, heads, groups), (vision_hidden, vision_ffn, vision_layers, vision_heads) = SIZES[size]
    text = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=vision_ffn,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=PICTURE,
        patch_size=PATCH,
    )
    LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN).save_pretrained(folder)
    preprocessor = {
        "size": {"shortest_edge": PICTURE},
        "crop_size": {"height": PICTURE, "width": PICTURE},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def make_batch(size: int, seed: int) -> Batch:
    """A micro batch of `size` samples with a random picture and a random caption each, padded as in training."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full(((PICTURE // PATCH) ** 2,), IMAGE_TOKEN)
    captions = torch.randint(CAPTION[0], CAPTION[1] + 1, (size,), generator=generator).tolist()
    longest = PROMPT + len(image) + max(captions) - 1
    length = -(-longest // MULTIPLE) * MULTIPLE
    input_ids = torch.full((size, length), PADDING)
    labels = torch.full((size, length), IGNORE)
    for row, caption in enumerate(captions):
        words = torch.randint(3, IMAGE_TOKEN, (PROMPT + caption,), generator=generator)
        text = torch.cat([words[: PROMPT // 2], image, words[PROMPT // 2 :]])
        input_ids[row, : len(text) - 1] = text[:-1]
        labels[row, len(text) - 1 - caption : len(text) - 1] = text[-caption:]
    pixels = torch.randint(0, 256, (size, 3, PICTURE, PICTURE), dtype=torch.uint8, generator=generator)
    return Batch(keys=[str(row) for row in range(size)], input_ids=input_ids, labels=labels, pixels=pixels)


def make_config(folder: Path, freeze: bool, precision: str, batches: list[Batch]) -> Config:
    """What our side is told; the learning rate stays the same."""
    micro_batch_size = len(batches[0].keys)
    return Config(
        model=Model(
            model_config=folder,
            decoder_seq_length=max(batch.labels.shape[1] for batch in batches),
            precision=precision,
            freeze_lm=freeze,
            freeze_vit=freeze,
        ),
        data=Data(data_path=folder, micro_batch_size=micro_batch_size, global_batch_size=micro_batch_size),
        optimizer=Optimizer(lr=LEARNING_RATE, min_lr=LEARNING_RATE),
        training=Training(train_iters=1000),
        checkpoint=Checkpoint(output=folder),
    )


def transformers_model(config: Config) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with SDPA and random weights, the same each time, on the device."""
    torch.manual_seed(1)
    with parallel.device():
        model = LlavaForConditionalGeneration._from_config(
            LlavaConfig.from_pretrained(config.model.description),
            attn_implementation="sdpa",
            dtype=DTYPES[config.model.precision],
        )
    return model.train()


def plain_loop(config: Config) -> Step:
    """transformers' LLaVA, its own loss, clipped gradients and torch's AdamW. What is frozen asks for no gradient."""
    model = transformers_model(config)
    if config.model.freeze_lm:
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
    settings, image = config.optimizer, read_image_settings(config.model.description)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.adam_eps)

    def step(batch: Batch) -> float:
        pixels = normalize(batch.pixels.to(parallel.device()), image.mean, image.std, model.dtype)
        # Ours are shifted already; transformers does it itself.
        labels = torch.cat([torch.full_like(batch.labels[:, :1], IGNORE), batch.labels[:, :-1]], dim=1)
        input_ids, labels = batch.input_ids.to(parallel.device()), labels.to(parallel.device())
        loss = model(input_ids=input_ids, pixel_values=pixels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def ours(config: Config) -> Step:
    """The step that training takes, from the same weights."""
    llava = read_config(config.model.description)
    weights = mcore_weights(transformers_model(config), llava)
    if uses_transformer_engine(config.model):
        weights = {to_transformer_engine_name(name): tensor for name, tensor in weights.items()}
    chunks = build_model(config, llava)
    missing, unexpected = chunks[0].load_state_dict(weights, strict=False)
    assert all(name.endswith("_extra_state") for name in (*missing, *unexpected)), (missing, unexpected)
    wrapped = wrap(chunks, config)
    optimizer = build_optimizer(wrapped, config, llava)
    scheduler, run = build_scheduler(optimizer, config, 0), batch_runner(config, llava)

    def step(batch: Batch) -> float:
        scheduler.step(1)
        return train_step(wrapped, optimizer, iter([batch]), run).totals.loss

    return step


def mcore_weights(model: LlavaForConditionalGeneration, llava: Llava) -> dict[str, torch.Tensor]:
    """megatron.core's whole state dict of transformers' weights, by the converter's tables."""
    tensors = {hub_name(llava, name): tensor.cpu() for name, tensor in model.state_dict().items()}
    tensors.pop(None, None)  # left out on purpose
    whole = to_mcore(rows(llava), InMemory(tensors, "transformers"), unused_names(llava))
    stage = Stage(range(llava.language.num_layers), pre_process=True, post_process=True)
    return rank_state_dict(whole, llava, stage, tp_rank=0, tp_size=1)
