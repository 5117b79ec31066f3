"""LLaVA from megatron.core's parts: CLIPViTModel, MultimodalProjector, GPTModel. State-dict names are LLaVAModel's.

Images are placeholders in the text before the model sees them (data/), so it never changes a sequence's length: it
puts the projected embeddings where the placeholders are.
"""

from __future__ import annotations

import contextlib
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.activations import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnBackend, AttnMaskType, ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_patch.config.train import Config
from megatron_patch.families.projector import PROJECTOR
from megatron_patch.families.sizes import LanguageModel, Llava, VisionModel
from megatron_patch.families.table import Family
from megatron_patch.model.offload import ActivationOffload
from megatron_patch.model.specs import block_spec, norm, projector_submodules, uses_transformer_engine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
"""Of weights and activations. Transformer Engine takes bf16 to fp8 and back around its matrix products."""

ACTIVATIONS = {
    "silu": F.silu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}

CHANGES_LOGITS = ("inference_context", "inference_params", "runtime_gather_output", "mtp_in_postprocess")
"""What megatron.core's model may be called with, and `_LanguageModel` has no part for."""


class LlavaModel(MegatronModule):
    """One pipeline stage of LLaVA, or one virtual stage. The first holds the vision tower and the projector.

    Args:
        config: what to do; freezing, precision, parallel sizes and recomputation are read from it.
        llava: sizes of the model.
        pre_process, post_process: whether this is the first and the last (virtual) pipeline stage.
        vp_stage: which of this rank's virtual stages; None without them.
    """

    def __init__(
        self,
        config: Config,
        llava: Llava,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        language = language_config(config, llava.language)
        super().__init__(config=language)
        self.vp_stage = vp_stage
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = llava.language.share_embeddings_and_output_weights
        self.offloads_activations = config.training.recompute == "offload"
        self.model_type = ModelType.encoder_or_decoder  # the schedules ask for it

        if pre_process:
            vision = vision_config(config, llava.vision)
            self.vision_model = CLIPViTModel(
                vision,
                block_spec(vision, config.model, AttnMaskType.no_mask),
                ln_pre_impl=norm(config.model),
                add_class_token=llava.vision.family.has("class_token"),
                patch_dim=llava.vision.patch_dim,
                # What is over at the edges fills no patch, and the convolution passes over it.
                img_h=llava.vision.grid * llava.vision.patch_dim,
                img_w=llava.vision.grid * llava.vision.patch_dim,
                # By which it has a norm before its layers, or a bias of its patches. There is no norm after them.
                model_subtype="clip" if llava.vision.family.has("ln_pre.weight") else "internvit",
            )
            self.num_dropped = int(llava.vision.select_strategy == "default")
            projector = projector_config(config, llava)
            self.vision_projection = MultimodalProjector(
                projector, projector_submodules(config.model), "mlp", llava.vision.hidden_size
            )
        self.language_model = _LanguageModel(
            language,
            block_spec(language, config.model, AttnMaskType.causal, vp_stage),
            vocab_size=llava.language.padded_vocab_size(config.parallel.tensor_model_parallel_size),
            max_sequence_length=config.model.decoder_seq_length,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="rope",
            rotary_base=llava.language.rotary_base,
            # Images come in between the embedding and this.
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
            rope_scaling=llava.language.rope_scaling_factor is not None,
            rope_scaling_factor=llava.language.rope_scaling_factor or 1.0,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
        )
        self.language_model.true_vocab_size = llava.language.vocab_size
        self._freeze(config)
        for parameter in self.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)

    def forward(
        self,
        input_ids: Tensor | None = None,
        image_positions: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        *,
        wanted: Tensor | None = None,
        image_rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states, logits or losses of one micro batch.

        Positions count through [s, b] as hidden states lie: position s of sample b is s * (number of samples) + b. They
        are given, and not found here, because to find them on a GPU the host would have to wait for it. With context
        parallelism, b and s are of this rank's part of the sequences, and the images are all of them.

        Args:
            input_ids: int64 [b, s], any token where there is a patch; None past the first stage.
            image_positions: int64 [patches]: where each patch lies; None past the first stage.
            pixel_values: normalised [n, 3, h, w]; n may be 0; None past the first stage.
            labels: int64 [number of labels], the ids to be predicted at `wanted`; None: no loss is wanted.
            packed_seq_params: where the samples of a packed sequence (b = 1) begin and end; None: a sample per row.
            wanted: int64 [number of labels], positions whose logits are needed; None: all, without labels.
            image_rows: int64 [patches]: which of all images' patches [n * patches] lie there; None: every one.

        Returns:
            Last stage: fp32 losses [number of labels], or without labels this rank's logits [b, s, vocabulary / TP], of
            wanted positions [number of them, vocabulary / TP].
            Other stages: hidden states [s, b, h], of s this rank's part under sequence parallelism.
        """
        with ActivationOffload(self) if self.offloads_activations else contextlib.nullcontext():
            embeddings = None
            if self.pre_process:
                assert input_ids is not None
                assert image_positions is not None
                assert pixel_values is not None
                embeddings = self._embed(input_ids, image_positions, image_rows, pixel_values)
            return self.language_model(
                input_ids=input_ids,
                position_ids=None,
                attention_mask=None,
                decoder_input=embeddings,
                labels=labels,
                packed_seq_params=packed_seq_params,
                loss_mask=wanted,
            )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states [s, b, h] of the previous pipeline stage."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The embedding, which is the output layer's weight too where a model ties them. megatron.core asks for it."""
        return self.language_model.shared_embedding_or_output_weight()

    def _embed(
        self, input_ids: Tensor, image_positions: Tensor, image_rows: Tensor | None, pixel_values: Tensor
    ) -> Tensor:
        text = self.language_model.embedding(input_ids, position_ids=None)  # [s, b, h]
        if pixel_values.shape[0] == 0:
            # A text without images trains like any other. All that is trained takes part, with a gradient of zero and
            # in the usual order, since ranks add up gradients together as they come.
            blank = pixel_values.new_zeros(1, *pixel_values.shape[1:])
            mixed = text + (0 * self._see(blank)).sum().to(text.dtype)
        else:
            images = self._see(pixel_values).to(text.dtype)  # [n * patches, h]
            if image_rows is not None:
                images = images.index_select(0, image_rows)
            # Its backward pass is an index_select: nothing is added up.
            mixed = text.flatten(0, 1).index_copy(0, image_positions, images).view_as(text)
        if self.config.sequence_parallel:
            mixed = tensor_parallel.scatter_to_sequence_parallel_region(mixed)
        return mixed.contiguous()

    def _see(self, pixel_values: Tensor) -> Tensor:
        """[n, 3, h, w] -> what stands for the images in the text [n * patches, h]."""
        features = self.vision_model(pixel_values)[:, self.num_dropped :]  # [n, patches, h_vision]
        return self.vision_projection(features).flatten(0, 1)

    def _freeze(self, config: Config) -> None:
        for name, parameter in self.named_parameters():
            if not config.model.trains(name):
                parameter.requires_grad_(False)


def find_patches(is_image: Tensor) -> Tensor:
    """bool [b, s] -> int64 [patches], LlavaModel's `image_positions`: one sample's patches after the other's."""
    found = is_image.flatten().nonzero().squeeze(1)
    size, length = is_image.shape
    return found % length * size + found // length


def find_positions(chosen: Tensor) -> Tensor:
    """bool [b, s] -> int64 [chosen], LlavaModel's `wanted`: an earlier position before a later one."""
    return chosen.transpose(0, 1).flatten().nonzero().squeeze(1)


class _LanguageModel(GPTModel):
    """GPTModel that computes logits at labelled positions only, and masks the padded rows of the vocabulary."""

    true_vocab_size: int

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor | None, loss_mask: Tensor | None, **others
    ) -> Tensor:
        """`hidden_states` [s, b, h], `labels` and `loss_mask`, LlavaModel's `wanted` -> what it returns.

        A caption labels some 30 of 620 positions: logits of the others would be the largest tensor of a step. Raises
        ValueError for what would change the logits of megatron.core's model and not these.
        """
        for name in CHANGES_LOGITS:
            if others.get(name):
                raise ValueError(f"{name}: not supported by this model's output layer, which gives all that is wanted")
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # Gathered here and not by the output layer, since labels are chosen along the whole sequence.
            self.output_layer.sequence_parallel, self.output_layer.allreduce_dgrad = False, True
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        shared = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if loss_mask is None:
            logits, _ = self.output_layer(hidden_states, weight=shared)
            return self._without_padding(logits).transpose(0, 1).contiguous()
        chosen = hidden_states.flatten(0, 1).index_select(0, loss_mask).unsqueeze(1)  # [chosen, 1, h]
        logits, _ = self.output_layer(chosen, weight=shared)  # [chosen, 1, vocab / TP]
        logits = self._without_padding(logits)
        if labels is None:
            return logits.squeeze(1)
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels.unsqueeze(1))
        return losses.squeeze(1)

    def _without_padding(self, logits: Tensor) -> Tensor:
        """Give rows past the vocabulary no probability: otherwise a loss counts tokens that do not exist."""
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        size = max(0, self.true_vocab_size - first)
        if size < logits.shape[-1]:
            logits[..., size:] = float("-inf")
        return logits


def language_config(config: Config, sizes: LanguageModel) -> TransformerConfig:
    """megatron.core's settings of the language model: its family's network, rotary embedding, no dropout."""
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    return TransformerConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.ffn_hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        num_query_groups=sizes.num_query_groups,
        kv_channels=sizes.kv_channels,
        layernorm_epsilon=sizes.layernorm_epsilon,
        **_network(sizes.family),
        bias_activation_fusion=sizes.family.is_gated and sizes.family.activation == "silu",
        # Transformer Engine's kernel; local layers have patches/rotary.py. It takes a packed sequence's borders on the
        # device, for which megatron.core's own rotation would wait in each layer.
        apply_rope_fusion=uses_transformer_engine(config.model),
        add_qkv_bias=sizes.family.has("linear_qkv.bias"),
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        # With two stages the previous and the next are one rank, and batched messages would cross, silently.
        overlap_p2p_comm=chunks > 1,
        batch_p2p_comm=chunks == 1,
        context_parallel_size=config.parallel.context_parallel_size,
        sequence_parallel=config.parallel.uses_sequence_parallel,
        # Each message is waited for on the computing stream, which is enough: the host need not wait for the GPU too.
        batch_p2p_sync=False,
        calculate_per_token_loss=True,
        fp8=_fp8(config),
        **_recompute(config, config.training.recompute_method, config.training.recompute_num_layers),
        **_common(config),
    )


def vision_config(config: Config, sizes: VisionModel) -> TransformerConfig:
    """megatron.core's settings of the vision tower, which stands on the first stage alone."""
    return TransformerConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.ffn_hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        layernorm_epsilon=sizes.layernorm_epsilon,
        **_network(sizes.family),
        bias_activation_fusion=False,
        fp8=_fp8(config),
        **(_recompute(config) if config.model.trains("vision_model") else {}),
        **_common(config),
    )


def projector_config(config: Config, llava: Llava) -> TransformerConfig:
    """megatron.core's settings of LLaVA-1.5's projector, whose width is the language model's.

    Its GELU is the exact one (erf): megatron.core's fused bias-GELU is the tanh approximation, 4e-4 away.
    """
    return TransformerConfig(
        num_layers=1,
        hidden_size=llava.language.hidden_size,
        ffn_hidden_size=llava.language.hidden_size,
        num_attention_heads=llava.language.num_attention_heads,
        kv_channels=llava.language.kv_channels,
        **_network(PROJECTOR),
        bias_activation_fusion=False,
        **_common(config),
    )


def _network(family: Family) -> dict:
    norm = {} if family.norm is None else {"normalization": family.norm}
    return {
        **norm,
        "activation_func": ACTIVATIONS[family.activation],
        "gated_linear_unit": family.is_gated,
        "add_bias_linear": family.has("linear_fc1.bias"),
    }


def _common(config: Config) -> dict:
    dtype = DTYPES[config.model.precision]
    return {
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,
        "attention_softmax_in_fp32": True,
        # Which kernels Transformer Engine may take: megatron.core tells it for all of the process, in the environment.
        "attention_backend": AttnBackend.unfused
        if uses_transformer_engine(config.model) and not config.model.use_flash_attn
        else AttnBackend.auto,
        "gradient_accumulation_fusion": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        # Under torch.device("meta") the network is built without memory for its weights, as torch's own modules are:
        # megatron.core asks for a device by name otherwise.
        "use_cpu_initialization": torch.get_default_device().type == "meta",
        # Weights that are read from a checkpoint are not drawn first. (Not by perform_initialization=False: that leaves
        # out the marks by which tensor-parallel weights are counted in the norm of the gradients.)
        **(
            {}
            if config.model.pretrained_checkpoint is None
            else {"init_method": _keep, "output_layer_init_method": _keep}
        ),
    }


def _fp8(config: Config) -> str | None:
    """E4M3 forward, E5M2 for gradients (arXiv:2209.05433). Not for the projector and the vocabulary."""
    return "hybrid" if config.model.precision == "fp8" else None


def _keep(weight: Tensor) -> Tensor:
    return weight


def _recompute(config: Config, method: str | None = None, num_layers: int | None = None) -> dict:
    granularity = config.training.recompute_granularity
    if granularity == "full":
        how = {"recompute_method": method or "uniform", "recompute_num_layers": num_layers or 1}
        return {"recompute_granularity": "full", **how}
    return {"recompute_granularity": granularity}
