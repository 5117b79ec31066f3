"""What to do: frozen settings, each with its flag's help text beneath it, and the checks that need no tensor.

Imports nothing heavy, so that a wrong setting is answered at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_patch.config.checkpoint import Checkpoint
from megatron_patch.config.checks import (
    require_finite,
    require_not_negative,
    require_positive,
    require_transformer_engine,
)
from megatron_patch.config.parallel import Parallel
from megatron_patch.families.sizes import Llava, divisors, listing
from megatron_patch.files.names import model_folder

MOCK = Path("mock")
"""In place of a dataset: random samples."""
Precision = Literal["bf16", "fp16", "fp32", "fp8"]
Recompute = Literal["none", "sel", "full", "offload", "true", "false"]
PromptFormatName = Literal["auto", "mistral", "llama_2", "llama_3", "v1", "plain", "chatml", "nvgpt", "tokenizer"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which network is trained and which parts of it."""

    model_size: str = "auto"
    """Size of the language model, such as 7B, checked against its config.json; auto: not checked."""

    pretrained_checkpoint: Path | None = None
    """Megatron-Core checkpoint to start from (mp_rank shards or torch_dist, at any TP and PP; a run's, or one iteration
    of it); none: new weights."""

    model_config: Path | None = None
    """Folder with config.json, tokenizer and processor of the LLaVA to train; none: the pretrained checkpoint's."""

    seq_length: int | None = None
    """Positions of one image (576 for CLIP at 336 pixels), checked against the tower; none: the tower's own."""

    decoder_seq_length: int = 1024
    """Longest sequence of the language model, images included, in tokens."""

    freeze_lm: bool = True
    """Keep the language model's weights as they are."""

    freeze_vit: bool = True
    """Keep the vision tower's weights as they are."""

    precision: Precision = "bf16"
    """Type of weights and activations; fp16 scales the loss as it goes; fp8 multiplies bf16 weights in fp8. Gradients
    and optimizer states are fp32."""

    use_flash_attn: bool = True
    """Fused attention (torch's scaled_dot_product_attention or Transformer Engine's); false: the unfused one."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers to build the network of; auto: Transformer Engine where it is installed and there is a GPU."""

    def trains(self, name: str) -> bool:
        """Whether the weight of this megatron.core name, or the part of the model of this name, is trained."""
        frozen = {"language_model": self.freeze_lm, "vision_model": self.freeze_vit}
        return not frozen.get(name.split(".")[0], False)

    @property
    def frozen(self) -> list[str]:
        """Parts of the model that are not trained."""
        return [part for part in ("language_model", "vision_model") if not self.trains(part)]

    def __post_init__(self) -> None:
        if self.precision == "fp8":
            require_transformer_engine("--precision fp8", "bf16, fp16 or fp32")
            if self.transformer_impl == "local":
                raise ValueError("--precision fp8 --transformer-impl local: these layers have no fp8; use auto")
        if self.transformer_impl == "transformer_engine":
            require_transformer_engine("--transformer-impl transformer_engine", "auto")
        if self.pretrained_checkpoint is None and self.model_config is None:
            raise ValueError(
                "--pretrained-checkpoint none: then --model-config is needed, a folder with the LLaVA's config.json, "
                "tokenizer and processor, which give the new model's sizes"
            )
        require_positive(self, "decoder_seq_length")

    @property
    def description(self) -> Path:
        """Folder that describes the model: config.json, tokenizer, processor."""
        folder = self.model_config or self.pretrained_checkpoint
        assert folder is not None, "refused above"
        return model_folder(folder)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on."""

    data_path: Path
    """Energon dataset (a folder prepared by energon, or a metadataset's .yaml), of which the train split is used; mock:
    random samples of LLaVA-Pretrain's sizes, to measure speed."""

    valid_data_path: Path | None = None
    """Energon dataset whose val split is used for validation, or mock; none: no validation."""

    micro_batch_size: int = 1
    """Samples per data-parallel rank that pass through the model at once."""

    global_batch_size: int = 256
    """Samples per iteration, over all ranks. A multiple of micro batch x data-parallel size."""

    num_workers: int = 2
    """Processes that read and decode samples, per data-parallel rank; 0: the training process does it."""

    shuffle_buffer_size: int = 1000
    """Samples that are shuffled among each other while reading; 0 or 1: the order of the shards."""

    packing_buffer_size: int = 0
    """Samples among which those are chosen that fill a sequence of --decoder-seq-length together, which then counts as
    one of a batch; 0: no packing."""

    prompt_format: PromptFormatName = "auto"
    """How a conversation becomes text; v1: Vicuna's; tokenizer: its own chat template; auto: the checkpoint's own."""

    image_transform: Literal["auto", "clip", "pad", "square"] = "auto"
    """How an image gets the tower's size. clip: shortest edge, then the middle; pad: the mean colour around it, as in
    LLaVA-1.5's second stage; square: stretched; auto: as the checkpoint's preprocessor_config.json says."""

    use_im_start_end: bool = False
    """Put <im_start> and <im_end> around each image, as NeVA does. The converter adds them: --add-tokens neva."""

    allow_dataset_code: bool = False
    """Run what a dataset's yaml files name beside energon's own classes, and its Python files."""

    def __post_init__(self) -> None:
        require_positive(self, "micro_batch_size", "global_batch_size")
        require_not_negative(self, "num_workers", "shuffle_buffer_size", "packing_buffer_size")
        if self.packs and self.micro_batch_size > 1:
            raise ValueError(
                f"--micro-batch-size {self.micro_batch_size}: packed samples are one sequence; use 1 with "
                f"--packing-buffer-size, and a longer --decoder-seq-length"
            )

    @property
    def packs(self) -> bool:
        """Whether several samples share a sequence."""
        return self.packing_buffer_size > 0

    def num_micro_batches(self, parallel: Parallel, world_size: int) -> int:
        """Micro batches that each data-parallel rank computes per iteration, or ValueError when sizes do not fit."""
        if world_size % parallel.model_parallel_size:
            raise ValueError(
                f"{world_size} processes: TP {parallel.tensor_model_parallel_size} x PP "
                f"{parallel.pipeline_model_parallel_size} x CP {parallel.context_parallel_size} needs a multiple of "
                f"{parallel.model_parallel_size}; set NPROC_PER_NODE or the parallel sizes"
            )
        data_parallel_size = world_size // parallel.model_parallel_size
        share = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % share:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size}: not a multiple of micro batch {self.micro_batch_size} "
                f"x {data_parallel_size} data-parallel ranks = {share}; "
                f"use {math.ceil(self.global_batch_size / share) * share}"
            )
        micro_batches, stages = self.global_batch_size // share, parallel.pipeline_model_parallel_size
        if parallel.virtual_pipeline_model_parallel_size > 1 and micro_batches % stages:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size}: {micro_batches} micro batches, and the interleaved "
                f"pipeline needs a multiple of its {stages} stages; use a multiple of {share * stages}"
            )
        return micro_batches


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Adam and its schedule."""

    lr: float
    """Highest learning rate, reached after the warmup."""

    min_lr: float = 0.0
    """Learning rate of the last iteration (cosine decay)."""

    lr_warmup_iters: int = 0
    """Iterations over which the learning rate rises from 0 to its highest."""

    weight_decay: float = 0.01
    """Decoupled weight decay; not applied to biases and norms."""

    adam_beta1: float = 0.9
    """Decay of the gradients' running mean."""

    adam_beta2: float = 0.95
    """Decay of the squared gradients' running mean."""

    adam_eps: float = 1e-8
    """Term that keeps Adam's division finite."""

    clip_grad: float = 1.0
    """Largest norm of all gradients together; larger ones are scaled down. 0: no clipping."""

    use_precision_aware_optimizer: bool = False
    """Transformer Engine's Adam: fp32 weights are kept as what their bf16 ones lack, moments in the types below."""

    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """With the precision-aware optimizer: type of the gradients' running mean."""

    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """With the precision-aware optimizer: type of the squared gradients' running mean."""

    optimizer_offload: Literal["false", "static", "auto"] = "false"
    """Optimizer states kept on the CPU and stepped there. static: all; auto: as many as free device memory asks for."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 or more, less than 1")
        if self.adam_eps <= 0:
            raise ValueError(f"--adam-eps {self.adam_eps}: expected a number above 0")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"--min-lr {self.min_lr}: expected a number from 0 to --lr {self.lr}")
        require_not_negative(self, "lr", "lr_warmup_iters", "weight_decay", "clip_grad")
        if self.use_precision_aware_optimizer:
            require_transformer_engine("--use-precision-aware-optimizer true", "false")
            if self.optimizer_offload != "false":
                raise ValueError(
                    f"--use-precision-aware-optimizer true: not with --optimizer-offload {self.optimizer_offload}, "
                    f"since the CPU's Adam is plain; use one of them"
                )
        for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
            given = getattr(self, name)
            if given != "fp32" and not self.use_precision_aware_optimizer:
                raise ValueError(
                    f"--{name.replace('_', '-')} {given}: needs --use-precision-aware-optimizer true; use fp32"
                )


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long, and what is watched."""

    train_iters: int
    """Iterations in all; a resumed run counts the ones before."""

    recompute: Recompute = "none"
    """Activations: sel (true) recomputes attention's, full whole layers; offload: kept on the CPU; none (false)."""

    recompute_method: Literal["uniform", "block"] | None = None
    """With full. uniform (none): all layers, in runs of recompute-num-layers; block: each stage's first so many."""

    recompute_num_layers: int | None = None
    """With full: layers of the language model per run or block; none: 1. A trained vision tower recomputes each."""

    seed: int = 1234
    """Seed of new weights and of the order of samples."""

    log_interval: int = 1
    """Iterations between log lines. TensorBoard gets every iteration."""

    eval_interval: int = 1000
    """Iterations between validations."""

    eval_iters: int = 10
    """Global batches of one validation; 0: none."""

    log_captions: int = 4
    """Samples of the val split that the model captions at each validation, for the log and TensorBoard; 0: none."""

    plan: bool = False
    """Print what the ranks need in memory and how long an iteration takes, by arithmetic, and start nothing."""

    exit_duration_in_mins: int | None = None
    """Minutes after which a run saves and ends, to be started again; none: it goes on to the last iteration."""

    distributed_timeout_minutes: int = 10
    """Minutes after which a rank that waits for another gives up."""

    def __post_init__(self) -> None:
        for name in ("recompute_method", "recompute_num_layers"):
            if getattr(self, name) is not None and self.recompute != "full":
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: needs --recompute full; use none")
        if self.recompute_num_layers is not None:
            require_positive(self, "recompute_num_layers")
        require_positive(self, "train_iters", "log_interval", "eval_interval", "distributed_timeout_minutes")
        require_not_negative(self, "eval_iters", "log_captions")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed {self.seed}: expected 0 to {2**31 - 1}")
        if self.exit_duration_in_mins is not None:
            require_positive(self, "exit_duration_in_mins")

    def check(self, num_layers: int) -> None:
        """Raise ValueError when the `num_layers` that stand together cannot be recomputed like this."""
        count = self.recompute_num_layers or 1
        if self.recompute_method == "block" and count > num_layers:
            raise ValueError(f"--recompute-num-layers {count}: a stage has {num_layers} layers; use 1 to {num_layers}")
        if self.recompute_method != "block" and num_layers % count:
            raise ValueError(
                f"--recompute-num-layers {count}: a stage has {num_layers} layers, which {count} does not divide; "
                f"use {listing(divisors(num_layers))}"
            )

    @property
    def recompute_granularity(self) -> Literal["selective", "full"] | None:
        """The setting in megatron.core's words; None where nothing is recomputed."""
        names: dict[str, Literal["selective", "full"]] = {"sel": "selective", "true": "selective", "full": "full"}
        return names.get(self.recompute)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a training run is told."""

    model: Model
    parallel: Parallel = field(default_factory=Parallel)
    data: Data
    optimizer: Optimizer
    training: Training
    checkpoint: Checkpoint

    def __post_init__(self) -> None:
        if self.optimizer.lr_warmup_iters >= self.training.train_iters:
            raise ValueError(
                f"--lr-warmup-iters {self.optimizer.lr_warmup_iters}: "
                f"expected less than --train-iters {self.training.train_iters}"
            )
        for name in ("optimizer_offload", "use_precision_aware_optimizer"):
            given = str(getattr(self.optimizer, name)).lower()
            if given != "false" and not self.parallel.use_distributed_optimizer:
                raise ValueError(f"--{name.replace('_', '-')} {given}: needs --use-distributed-optimizer true")
        if self.model.precision == "fp8" and (self.training.recompute == "offload" or self.data.packs):
            raise ValueError(
                "--precision fp8: not with --recompute offload, which would copy its weights, nor with "
                "--packing-buffer-size, whose samples would not fill what its kernels ask for; use bf16"
            )
        if self.parallel.context_parallel_size > 1 and not self.model.use_flash_attn:
            raise ValueError(
                "--use-flash-attn false: megatron.core's unfused attention cannot share a sequence; use true with "
                f"--context-parallel-size {self.parallel.context_parallel_size}"
            )
        if self.data.packs and not self.model.use_flash_attn:
            raise ValueError(
                "--use-flash-attn false: megatron.core's unfused attention cannot tell packed samples apart; use true"
            )
        if self.data.packs and self.parallel.virtual_pipeline_model_parallel_size > 1:
            raise ValueError(
                "--packing-buffer-size: virtual stages would each need the packed samples' lengths; use 0, or "
                "--virtual-pipeline-model-parallel-size 1"
            )

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate on, and anything to be done with it."""
        return self.data.valid_data_path is not None and self.training.eval_iters > 0

    def check(self, llava: Llava) -> None:
        """Raise ValueError for whatever cannot work with this model. Nothing is started before."""
        llava.check_model_size(self.model.model_size)
        self.parallel.check(llava)
        self.training.check(self.parallel.num_layers_per_chunk(llava))
        is_random = self.model.pretrained_checkpoint is None and bool(self.model.frozen)
        if is_random and self.data.data_path != MOCK and not self.training.plan:
            raise ValueError(
                "--pretrained-checkpoint none: new weights are random and would stay so where they are frozen; "
                "give --freeze-lm false --freeze-vit false, or --data-path mock to measure speed"
            )
        tokens = llava.vision.num_image_tokens
        if self.model.seq_length not in (None, tokens):
            raise ValueError(
                f"--seq-length {self.model.seq_length}: an image of {llava.vision.img_size} pixels in patches of "
                f"{llava.vision.patch_dim} takes {tokens} positions; use {tokens}"
            )
        length, window = self.model.decoder_seq_length, llava.language.sliding_window
        if length <= tokens:
            raise ValueError(f"--decoder-seq-length {length}: an image alone takes {tokens} positions; use more")
        if window is not None and length > window:
            raise ValueError(
                f"--decoder-seq-length {length}: the language model's sliding window is {window}, and megatron.core "
                f"attends to everything; use at most {window}"
            )
        longest = llava.language.max_position_embeddings
        if length > longest:
            raise ValueError(f"--decoder-seq-length {length}: the language model knows {longest} positions; use those")
