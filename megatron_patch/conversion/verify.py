"""Proof that a conversion is right: transformers' network and megatron.core's see the same image and prompt.

Both networks are built without memory for their weights. While one runs, each module's weights are read when it is
called and let go when it returns, so that a block of a model is in memory and never a model. What every block gave is
compared with what its counterpart on the other side gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from megatron_patch.config.train import Checkpoint, Config, Data, Model, Optimizer, Parallel, Training
from megatron_patch.conversion import companions
from megatron_patch.conversion.settings import DTYPES, Conversion
from megatron_patch.conversion.sources import EMBED_TOKENS, LM_HEAD
from megatron_patch.data.tokenize import load_tokenizer
from megatron_patch.families.layout import pad_vocab
from megatron_patch.families.llava import hub_name
from megatron_patch.families.sizes import Llava
from megatron_patch.files.marks import check_page
from megatron_patch.model import groups
from megatron_patch.model.llava import LlavaModel, find_patches
from megatron_patch.stores.reader import Reader

Load = Callable[[str], Tensor]
See = Callable[[str, Tensor], None]

FIXED_PROMPT = (
    "<image>\nWhat is in this picture? It shows a quiet street after the rain, with two people under one umbrella, "
    "a dog that waits beside a red bicycle, and 7 pigeons on the roof of the old town hall."
)
"""What --verify asks both models about an image."""
REPORT = '{\n  "equal": '
"""How a parity.json begins."""
TOLERANCE = 1e-4
"""Largest difference that rounding explains, as a part of the block's largest value (of 1, where that is less)."""


@dataclass(frozen=True)
class Block:
    """How far apart both sides are after one block."""

    name: str
    max_abs_difference: float
    cosine: float
    largest_value: float

    @property
    def diverges(self) -> bool:
        """Whether more than rounding is between them (or a value is NaN)."""
        return not self.max_abs_difference <= TOLERANCE * max(1.0, self.largest_value)


@dataclass(frozen=True)
class Parity:
    """What a comparison found, in the order of the blocks; the last one is the logits."""

    num_positions: int
    blocks: list[Block]
    top1_agreement: float
    """Part of the positions at which both sides predict the same token."""

    @property
    def first_divergence(self) -> Block | None:
        """The first block after which the sides differ by more than rounding."""
        return next((block for block in self.blocks if block.diverges), None)

    def to_dict(self) -> dict[str, Any]:
        """The content of parity.json; NaN is null there."""
        first = self.first_divergence
        blocks = [
            {
                name: value if isinstance(value, str) or math.isfinite(value) else None
                for name, value in asdict(block).items()
            }
            for block in self.blocks
        ]
        return {
            "equal": first is None,
            "first_divergence": first and first.name,
            "tolerance": TOLERANCE,
            "num_positions": self.num_positions,
            "top1_agreement": self.top1_agreement,
            "logits_max_abs_difference": blocks[-1]["max_abs_difference"],
            "blocks": blocks,
        }


def verify(
    llava: Llava,
    hf_config: dict[str, Any],
    hf: Reader,
    mcore: Reader,
    input_ids: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> Parity:
    """Run both sides in fp32 on a fixed image and the prompt `input_ids`, int64 [1, s] with its placeholders.

    `hf`: tensors under the hub's names, the unused ones included. `mcore`: whole tensors under the local spec's names.
    `hf_config`: a LlavaConfig. `dtype`: the type of the conversion, to which the source's weights are rounded first.
    megatron.core's groups must have been started, for one process. Raises ValueError or OSError as the readers do.
    """
    input_ids, pixels = input_ids.to(device), fixed_image(llava.vision.img_size).to(device)

    def weights(reader: Reader) -> Load:
        return lambda name: reader[name].to(device, dtype)

    expected: dict[str, Tensor] = {}
    blocks = []

    def compare(name: str, tensor: Tensor) -> None:
        blocks.append(_compare(name, expected[name], tensor))

    with torch.no_grad():
        _run_hf(llava, hf_config, weights(hf), input_ids, pixels, expected.__setitem__)
        logits = _run_mcore(llava, weights(mcore), input_ids, pixels, compare)
    assert [block.name for block in blocks] == list(expected), "both sides have the same blocks"
    top1 = (expected["logits"].argmax(-1) == logits.argmax(-1)).float().mean().item()
    return Parity(num_positions=input_ids.shape[1], blocks=blocks, top1_agreement=top1)


def fixed_image(size: int) -> Tensor:
    """An image with something in every patch, normalised as CLIP's are: fp32 [1, 3, size, size]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return smooth + 0.1 * torch.randn(1, 3, size, size, generator=generator)


def _compare(name: str, reference: Tensor, tensor: Tensor) -> Block:
    def product(one: Tensor, other: Tensor) -> float:
        return torch.linalg.vecdot(one, other).double().sum().item()  # one sum in fp32 would be off by a thousandth

    lengths = (product(reference, reference) * product(tensor, tensor)) ** 0.5
    return Block(
        name=name,
        max_abs_difference=(reference - tensor).abs().max().item(),
        cosine=product(reference, tensor) / max(lengths, 1e-30),
        largest_value=reference.abs().max().item(),
    )


def _run_hf(llava: Llava, hf_config: dict[str, Any], weight: Load, input_ids: Tensor, pixels: Tensor, see: See) -> None:
    """Show what every block of transformers' LLaVA gives, [b, s, h], and the logits [b, s, vocabulary]."""
    config = LlavaConfig.from_dict(_fp32_without_window(hf_config))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).eval()
    _make_buffers(model, config, pixels.device)
    tied = llava.language.share_embeddings_and_output_weights

    def load(name: str) -> Tensor:
        own = hub_name(llava, name)
        assert own is not None, name
        return weight(EMBED_TOKENS if tied and own == LM_HEAD else own).float()

    stream_weights(model, load)
    modules: dict[str, Any] = {name.removeprefix("model."): module for name, module in model.named_modules()}
    tower = modules.get("vision_tower.vision_model", modules["vision_tower"])  # transformers 4 has one more module
    used = {name.split(".")[1] for row in llava.vision.family.weights for name in row.hf}
    for name in set(dict(tower.named_children())) - used:  # norm and pooling after the layers
        setattr(tower, name, nn.Identity())
    language = modules["language_model"]
    watch = Watch(see)
    watch.layers("vision_model", tower.encoder.layers[: llava.vision.num_layers])
    watch.output("vision_projection", modules["multi_modal_projector"])
    watch.layers("language_model", language.layers)
    watch.output("language_model.final_layernorm", language.norm)
    # transformers looks placeholders up before it replaces them, and a source has no row for them.
    language.embed_tokens.register_forward_pre_hook(
        lambda module, args: (args[0].masked_fill(args[0] == llava.image_token_id, 0),)
    )
    logits = model(input_ids=input_ids, pixel_values=pixels, use_cache=False).logits
    see("logits", logits[..., : llava.language.vocab_size])  # an export has rows for the image token


def _run_mcore(llava: Llava, weight: Load, input_ids: Tensor, pixels: Tensor, see: See) -> Tensor:
    """Show what every block of our LLaVA gives, [b, s, h], and return the logits [b, s, vocabulary]."""
    with torch.device("meta"):
        model = LlavaModel(_config(), llava).eval()
    tower, language = model.vision_model, model.language_model
    tower.position_ids = torch.arange(tower.seq_length, device=pixels.device).expand(1, -1)
    padded_vocab_size = llava.language.padded_vocab_size(1)

    def load(name: str) -> Tensor:
        tensor = weight(name)
        is_table = name.endswith(("word_embeddings.weight", "output_layer.weight"))
        return (pad_vocab(tensor, padded_vocab_size) if is_table else tensor).float()

    # The output layer of a tied model takes the embedding where it lies.
    stays = language.embedding.word_embeddings if llava.language.share_embeddings_and_output_weights else None
    stream_weights(model, load, stays)
    watch = Watch(see, lambda hidden: hidden.transpose(0, 1))  # [s, b, h] -> [b, s, h]
    watch.layers("vision_model", tower.decoder.layers)
    Watch(see).output("vision_projection", model.vision_projection)  # [n, patches, h] on both sides
    watch.layers("language_model", language.decoder.layers)
    watch.output("language_model.final_layernorm", language.decoder.final_layernorm)
    is_image = input_ids == llava.image_token_id
    tokens = input_ids.masked_fill(is_image, 0)  # `<image>` may lie past the table
    logits = model(tokens, find_patches(is_image), pixels)[..., : llava.language.vocab_size]
    see("logits", logits)
    return logits


def _fp32_without_window(hf_config: dict[str, Any]) -> dict[str, Any]:
    """A LlavaConfig to compute in fp32. A run's sequences are never longer than a window; megatron.core has none."""
    types = dict.fromkeys(("dtype", "torch_dtype"), "float32")
    text = {**hf_config["text_config"], **types, "sliding_window": None}
    return {**hf_config, **types, "text_config": text, "vision_config": {**hf_config["vision_config"], **types}}


def _make_buffers(model: nn.Module, config: LlavaConfig, device: torch.device) -> None:
    """Give transformers' network the constants that it computes when it is built: they are in no checkpoint."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "inv_freq"):
                setattr(module, name, type(child)(config=config.text_config).to(device))
        if "position_ids" in module._buffers:
            count: Any = module.num_positions
            module.position_ids = torch.arange(count, device=device).expand(1, -1)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"constants of transformers' network that are not known here: {left}"


def _config() -> Config:
    """A run's settings, as far as the network depends on them."""
    nowhere = Path()
    return Config(
        model=Model(pretrained_checkpoint=nowhere, precision="fp32", transformer_impl="local"),
        data=Data(data_path=nowhere),
        optimizer=Optimizer(lr=0.0),
        training=Training(train_iters=1),
        checkpoint=Checkpoint(output=nowhere),
    )


class Watch:
    """Shows what modules get and give when they are called."""

    def __init__(self, see: See, arrange: Callable[[Tensor], Tensor] = lambda hidden: hidden) -> None:
        self.see = see
        self.arrange = arrange

    def layers(self, model: str, layers: nn.ModuleList) -> None:
        """Show what the first layer gets (the embedding) and what every layer gives."""

        def show(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.see(f"{model}.embedding", self.arrange(args[0] if args else kwargs["hidden_states"]))

        layers[0].register_forward_pre_hook(show, with_kwargs=True)
        for number, layer in enumerate(layers):
            self.output(f"{model}.layers.{number}", layer)

    def output(self, name: str, module: nn.Module) -> None:
        """Show what a module gives."""

        def show(module: nn.Module, args: tuple, output: Any) -> None:
            self.see(name, self.arrange(output[0] if isinstance(output, tuple) else output))

        module.register_forward_hook(show)


def stream_weights(model: nn.Module, load: Load, stays: nn.Module | None = None) -> None:
    """Have every module of a network on the meta device read its own weights when it is called, and then let go.

    `load` gives a weight by its name. `stays`: a module whose weights stay after its call.
    """

    def stream(prefix: str, module: nn.Module, empty: dict[str, nn.Parameter]) -> None:
        def fill(module: nn.Module, args: tuple) -> None:
            for name in empty:
                module._parameters[name] = nn.Parameter(load(f"{prefix}.{name}"), requires_grad=False)

        module.register_forward_pre_hook(fill)
        if module is not stays:
            module.register_forward_hook(lambda module, args, output: module._parameters.update(empty))

    for prefix, module in model.named_modules():
        empty = dict(module.named_parameters(recurse=False))
        if empty:
            stream(prefix, module, empty)


def prove(conversion: Conversion, folder: Path, llava: Llava, hf: Reader, mcore: Reader) -> dict[str, Any]:
    """Compare both sides, write parity.json into the new `folder`, and return what it says.

    Raises ValueError when they diverge; the report then lies beside the target, of which nothing is left.
    """
    dtype = getattr(torch, DTYPES[conversion.precision])
    ids = load_tokenizer(folder)(FIXED_PROMPT, add_special_tokens=False).input_ids
    counts = [llava.vision.num_image_tokens if id == llava.image_token_id else 1 for id in ids]
    prompt = torch.tensor([ids]).repeat_interleave(torch.tensor(counts), dim=1)
    with TemporaryDirectory() as store:
        groups.start(Parallel(), seed=0, init_method=f"file://{store}/store", rank=0, world_size=1)
        try:
            parity = verify(llava, companions.read_json(folder), hf, mcore, prompt, dtype, groups.device())
        finally:
            groups.stop()
    report = parity.to_dict()
    first = parity.first_divergence
    if first is not None:
        path = conversion.target_ckpt_path.with_name(f"{conversion.target_ckpt_path.name}.{companions.PARITY}")
        try:
            check_page(path, REPORT)
            companions.write_json(path.parent, path.name, report)
            more = f"{path} has every block"
        except (ValueError, OSError) as error:
            more = f"no report of every block: {error}"
        raise ValueError(
            f"{conversion.target_ckpt_path}: not written, since its model diverges from the source's at {first.name} "
            f"(largest difference {first.max_abs_difference:.3g}, cosine {first.cosine:.6f}); {more}"
        )
    companions.write_json(folder, companions.PARITY, report)
    print(f"verified: logits differ by at most {report['logits_max_abs_difference']:.3g}, {companions.PARITY} has more")
    return report
