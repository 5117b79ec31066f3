"""How a run is sharded over ranks: the part of a run's settings that knows what divides what. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_patch.config.checks import require_positive
from megatron_patch.families.sizes import Llava, divisors, listing


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the model and the batch are sharded over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer's weights. Divides the attention heads and the query groups."""

    pipeline_model_parallel_size: int = 1
    """Stages that share the language model's layers. Divides their number."""

    virtual_pipeline_model_parallel_size: int = 1
    """Chunks of layers that each pipeline stage holds in turns (interleaved schedule); 1: one after another."""

    context_parallel_size: int = 1
    """Ranks that share every sequence."""

    sequence_parallel: bool | None = None
    """Cut norms and dropouts along the sequence over the tensor-parallel ranks; none: wherever TP is more than 1."""

    env: Literal["dsw", "dlc"] = "dsw"
    """Where it runs. dsw: this machine; dlc: several, told by WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT."""

    use_distributed_optimizer: bool = True
    """Cut the optimizer's states over the data-parallel ranks (ZeRO-1)."""

    overlap_grad_reduce: bool = False
    """Add up gradients over the data-parallel ranks in pieces, while the backward pass goes on."""

    overlap_param_gather: bool = False
    """Gather the weights that data-parallel ranks have stepped in pieces, while the next forward pass goes on."""

    def __post_init__(self) -> None:
        require_positive(self, "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        require_positive(self, "virtual_pipeline_model_parallel_size")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("--sequence-parallel true: needs --tensor-model-parallel-size of 2 or more; use none")
        if self.virtual_pipeline_model_parallel_size > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"--virtual-pipeline-model-parallel-size {self.virtual_pipeline_model_parallel_size}: needs "
                f"--pipeline-model-parallel-size of 2 or more; use 1"
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError(
                "--overlap-param-gather true: needs --use-distributed-optimizer true and --overlap-grad-reduce true; "
                "use false"
            )

    def check(self, llava: Llava) -> None:
        """Raise ValueError when the model cannot be sharded like this."""
        self.check_tensor_parallel(llava)
        stages, layers = self.pipeline_model_parallel_size, llava.language.num_layers
        if layers % stages:
            raise ValueError(
                f"--pipeline-model-parallel-size {stages}: the language model has {layers} layers, which {stages} does "
                f"not divide; use {listing(divisors(layers))}"
            )
        chunks = self.virtual_pipeline_model_parallel_size
        if layers // stages % chunks:
            raise ValueError(
                f"--virtual-pipeline-model-parallel-size {chunks}: a stage has {layers // stages} layers, which "
                f"{chunks} does not divide; use {listing(divisors(layers // stages))}"
            )

    def check_tensor_parallel(self, llava: Llava) -> None:
        """Raise ValueError when a layer cannot be sharded like this."""
        size = self.tensor_model_parallel_size
        sharded = (
            ("the language model", "attention heads", llava.language.num_attention_heads),
            ("the language model", "query groups", llava.language.num_query_groups),
            ("the language model", "feed-forward channels", llava.language.ffn_hidden_size),
            ("the projector", "channels", llava.language.hidden_size),
            ("the vision tower", "attention heads", llava.vision.num_attention_heads),
            ("the vision tower", "feed-forward channels", llava.vision.ffn_hidden_size),
        )
        for model, what, count in sharded:
            if count % size:
                allowed = [n for n in range(1, 65) if all(c % n == 0 for _, _, c in sharded)]
                raise ValueError(
                    f"--tensor-model-parallel-size {size}: {model} has {count} {what}, which {size} does not divide; "
                    f"use {listing(allowed)}"
                )

    def num_layers_per_chunk(self, llava: Llava) -> int:
        """Layers of the language model that stand together: of a stage, or of one of its virtual stages."""
        chunks = self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size
        return llava.language.num_layers // chunks

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether activations between layers are sharded along the sequence over the tensor-parallel ranks."""
        return self.tensor_model_parallel_size > 1 if self.sequence_parallel is None else self.sequence_parallel

    @property
    def sequence_multiple(self) -> int:
        """What a sequence's length must be a multiple of: two pieces per context-parallel rank, equal per TP rank."""
        pieces = 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1
        return pieces * (self.tensor_model_parallel_size if self.uses_sequence_parallel else 1)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
