"""What benchmarks of training compare: a training step of ours, and one of a plain PyTorch loop over transformers'.

Weights lie on the device from the beginning: transformers draws them there, and ours are laid out from those by the
converter's table. A contestant is built once, and `reset` gives it the weights that it began with.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from inputs import IGNORE, Batch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from megatron_patch.config.train import Config, Data
from megatron_patch.data.images import normalize
from megatron_patch.data.preprocessor import read_image_settings
from megatron_patch.families.fused_names import to_transformer_engine_name
from megatron_patch.families.layout import merge, pad_vocab
from megatron_patch.families.llava import hub_name, read_config, rows, unused_shapes
from megatron_patch.families.sizes import Llava
from megatron_patch.families.stages import Stage
from megatron_patch.model import groups
from megatron_patch.model.llava import DTYPES
from megatron_patch.model.specs import uses_transformer_engine
from megatron_patch.training.loop import build_model
from megatron_patch.training.optimizer import build_optimizer, build_scheduler, wrap
from megatron_patch.training.step import batch_runner, train_step


class Contestant:
    """A model and its optimizer.

    `keep_start`: hold a copy of the trained weights, which `reset` needs.
    """

    def __init__(self, trained: list[nn.Parameter], keep_start: bool) -> None:
        self.trained = trained
        self.start = [parameter.detach().clone() for parameter in trained] if keep_start else None

    @property
    def kept_bytes(self) -> int:
        """What the copy for `reset` takes, which a training run does without."""
        return sum(tensor.nbytes for tensor in self.start or ())

    def step(self, *batches: Batch) -> float:
        """Train on these micro batches; returns the mean loss of their labels, and so waits for the device."""
        raise NotImplementedError

    def reset(self) -> None:
        """Put back the weights of the beginning, and forget the optimizer's states and the gradients."""
        assert self.start is not None, "built without a copy of the weights"
        with torch.no_grad():
            torch._foreach_copy_(self.trained, self.start)


class Transformers(Contestant):
    """transformers' LLaVA with SDPA, its own loss, clipped gradients, torch's AdamW; no gradients of frozen parts.

    16-bit weights have fp32 copies, which the optimizer steps: the same work as ours.
    """

    def __init__(self, config: Config, keep_start: bool = True) -> None:
        self.model = transformers_model(config)
        self.model.model.language_model.requires_grad_(config.model.trains("language_model"))
        self.model.lm_head.requires_grad_(config.model.trains("language_model"))
        self.model.model.vision_tower.requires_grad_(config.model.trains("vision_model"))
        self.settings = config.optimizer
        self.image = read_image_settings(config.model.description)
        super().__init__([parameter for parameter in self.model.parameters() if parameter.requires_grad], keep_start)
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        settings = self.settings
        # A copy of an fp32 weight is the weight itself.
        self.stepped = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.trained]
        parameters = [
            {"params": [p for p in self.stepped if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.stepped if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            fused=self.trained[0].is_cuda,
        )

    def step(self, *batches: Batch) -> float:
        num_labels = [int((batch.labels != IGNORE).sum()) for batch in batches]
        losses = []
        for batch, count in zip(batches, num_labels, strict=True):
            loss = self._loss(batch) * (count / sum(num_labels))
            loss.backward()
            losses.append(loss.detach())
        for stepped, parameter in zip(self.stepped, self.trained, strict=True):
            if stepped is not parameter:
                stepped.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self.stepped, self.settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.stepped[0] is not self.trained[0]:
            with torch.no_grad():
                torch._foreach_copy_(self.trained, self.stepped)
        return sum(losses).item()

    def _loss(self, batch: Batch) -> Tensor:
        device = self.model.device
        pixels = normalize(batch.pixels.to(device), self.image.mean, self.image.std, self.model.dtype)
        # Ours are shifted already; transformers does it itself.
        labels = torch.cat([torch.full_like(batch.labels[:, :1], IGNORE), batch.labels[:, :-1]], dim=1)
        return self.model(input_ids=batch.input_ids.to(device), pixel_values=pixels, labels=labels.to(device)).loss

    def reset(self) -> None:
        super().reset()
        self.model.zero_grad()
        self._make_optimizer()


class Ours(Contestant):
    """The step that training takes.

    `weights`: transformers' model, to begin with the same; None: new ones.
    """

    def __init__(
        self, config: Config, weights: LlavaForConditionalGeneration | None = None, keep_start: bool = True
    ) -> None:
        self.config, self.llava = config, read_config(config.model.description)
        self.chunks = build_model(config, self.llava)
        if weights is not None:
            copy_weights(weights, self.chunks[0], self.llava, uses_transformer_engine(config.model))
        self.wrapped = wrap(self.chunks, config)
        self.optimizer = build_optimizer(self.wrapped, config, self.llava)
        self.scheduler = build_scheduler(self.optimizer, config, 0)
        self.run = batch_runner(config, self.llava)
        super().__init__([p for p in self.chunks[0].parameters() if p.requires_grad], keep_start)

    @property
    def language_model(self) -> nn.Module:
        """megatron.core's part whose layers are most of the work."""
        return self.chunks[0].language_model

    def take(self, data: Data) -> None:
        """Train on batches of these sizes from now on."""
        self.config = replace(self.config, data=data)
        self.run = batch_runner(self.config, self.llava)

    def step(self, *batches: Batch) -> float:
        self.scheduler.step(1)
        return float(train_step(self.wrapped, self.optimizer, iter(batches), self.run).totals.loss)

    def reset(self) -> None:
        super().reset()
        self.optimizer.zero_grad()
        self.optimizer.reload_model_params()  # the fp32 copies
        for optimizer in self.torch_optimizers():
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group.pop("step", None)  # where Transformer Engine's Adam counts

    def torch_optimizers(self) -> list[torch.optim.Optimizer]:
        """What megatron.core's optimizer steps with."""
        return [part.optimizer for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer])]


def transformers_model(config: Config) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with SDPA and random weights, the same each time, on the device."""
    torch.manual_seed(1)
    with groups.device():
        model = LlavaForConditionalGeneration._from_config(
            LlavaConfig.from_pretrained(config.model.description),
            attn_implementation="sdpa",
            dtype=DTYPES[config.model.precision],
        )
    return model.train()


def copy_weights(
    source: LlavaForConditionalGeneration, target: nn.Module, llava: Llava, for_transformer_engine: bool = False
) -> None:
    """Fill `target`, the whole LlavaModel, with transformers' weights by the converter's table, tensor by tensor."""
    tensors = {hub_name(llava, name): tensor.detach() for name, tensor in source.state_dict().items()}
    tensors.pop(None, None)  # left out on purpose
    stage = Stage(range(llava.language.num_layers), pre_process=True, post_process=True)
    waiting = {name: tensor for name, tensor in target.state_dict().items() if not name.endswith("_extra_state")}
    for weight in rows(llava):
        whole = merge(weight, [tensors.pop(name) for name in weight.hf])
        if weight.layout == "vocab":
            whole = pad_vocab(whole, llava.language.padded_vocab_size(1))
        name = stage.local_name(weight.mcore)
        waiting.pop(to_transformer_engine_name(name) if for_transformer_engine else name).copy_(whole)
    assert not waiting, f"not filled: {list(waiting)}"
    assert set(tensors) == set(unused_shapes(llava, tensors)), f"left over: {list(tensors)}"
