"""What a conversion is told, and what its sources say of themselves. Imports nothing heavy.

Of the settings, each has its flag's help text beneath it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from megatron_patch.config.flags import flag
from megatron_patch.config.train import Parallel, Precision, PromptFormatName
from megatron_patch.conversion import companions
from megatron_patch.families import llava_repository
from megatron_patch.families.hf_config import describe, describe_language_model, describe_vision_model, llava_config
from megatron_patch.families.sizes import Llava
from megatron_patch.families.stages import Stage, pipeline_stages, stage_lengths
from megatron_patch.families.table import short
from megatron_patch.files.names import model_folder
from megatron_patch.stores.hf_files import check_indices, refuse_adapter

T = TypeVar("T")

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SIZE = r"([1-9][0-9]*)([KMGT])B"
AUTO_VERIFY_BYTES = 1000**3
UNEQUAL = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
FOR_EXPORT = ("parts", "max_shard_size")
FOR_IMPORT = ("projector", "add_tokens", "seed", "ckpt_format", "virtual_pipeline_model_parallel_size", *UNEQUAL)
# With --mg2hf false the source tells which of its two ways it is.
NOT_FROM_HF = ("hf_ckpt_path", "no_check", "ckpt_step")
NOT_FROM_MCORE = ("source_clip_ckpt_path", "projector", "add_tokens", "prompt_format", "seed")
# What NeMo's NeVA adds besides `<image>`.
NEVA_TOKENS = ("<im_start>", "<im_end>", *(f"<extra_id_{number}>" for number in range(8)))


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Convert LLaVA between Hugging Face and Megatron-Core."""

    model_size: str = "auto"
    """Size of the language model, such as 7B, checked against its config.json; auto: not checked."""

    source_llm_ckpt_path: Path
    """Hugging Face folder of a Llama, Vicuna, Mistral or Qwen2, or of a whole LLaVA, of the LLaVA repository too; with
    --mg2hf true a Megatron-Core checkpoint, shards or torch_dist, or one iteration of a run. With --mg2hf false such a
    checkpoint is resharded."""

    source_clip_ckpt_path: Path | None = None
    """Hugging Face folder of a vision tower (or of a whole CLIP or the like); none: the source is a whole LLaVA. With
    --mg2hf true only where the checkpoint lacks the tower's unused last layers."""

    projector: Path | None = None
    """LLaVA's mm_projector.bin to begin with; none: a new projector, or the whole LLaVA's. --parts writes one."""

    target_ckpt_path: Path
    """Folder for the result: new or empty. It appears when it is whole."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer of the shards written. A checkpoint is read at any size."""

    pipeline_model_parallel_size: int = 1
    """Stages that share the layers of the shards written."""

    virtual_pipeline_model_parallel_size: int = 1
    """Virtual stages that each of these holds (interleaved schedule): model0, model1, ... in a shard; 1: model."""

    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first stage; the others share the rest equally. none: as many as the others."""

    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last stage; the others share the rest equally. none: as many as the others."""

    ckpt_format: Literal["torch", "torch_dist"] = "torch"
    """With --mg2hf false: what is written. torch: a file for each rank (mp_rank shards); torch_dist: megatron.core's
    distributed checkpoint, which is not sharded and is loaded at any parallel sizes."""

    mg2hf: bool = False
    """Direction; false: Hugging Face to Megatron-Core, true: Megatron-Core to Hugging Face."""

    ckpt_step: int | None = None
    """Iteration to read of a Megatron-Core checkpoint that has several; none: the one that its tracker names."""

    precision: Precision = "bf16"
    """Type of the weights written: bf16, fp16 or fp32."""

    hf_ckpt_path: Path | None = None
    """A LLaVA's folder, for the config.json and tokenizer that a Megatron-Core checkpoint does not carry."""

    prompt_format: PromptFormatName = "auto"
    """Chat template that is written beside the weights; auto: the language model family's own, or the one there is."""

    add_tokens: str | None = None
    """Tokens for the tokenizer besides <image>, separated by commas, or neva for those that NeMo's NeVA adds. Embedding
    and output layer get rows up to the last one's id, the mean of the others; an export keeps them."""

    parts: Literal["false", "true", "projector"] = "false"
    """With --mg2hf true. true: write language_model/, vision_tower/ and mm_projector.bin beside the LLaVA; projector:
    write mm_projector.bin alone."""

    max_shard_size: str = "5GB"
    """With --mg2hf true: largest file of weights, such as 500MB or 5GB."""

    verify: Literal["true", "false", "auto"] = "auto"
    """Run both models block by block on a fixed image and prompt, and write parity.json; auto: with less than 1 GB of
    weights."""

    no_check: bool = False
    """Read a Megatron-Core checkpoint without comparing it with its manifest.json."""

    seed: int = 1234
    """Seed of the new projector's weights."""

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ValueError(f"--precision {self.precision}: weights are kept as bf16, fp16 or fp32; use one of these")
        if not re.fullmatch(SIZE, self.max_shard_size):
            raise ValueError(f"--max-shard-size {self.max_shard_size}: expected a size such as 500MB or 5GB")
        needed = str(not self.mg2hf).lower()
        self.refuse(FOR_IMPORT if self.mg2hf else FOR_EXPORT, f"--mg2hf {needed}")
        defaults = self._defaults
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", *UNEQUAL):
            given, default = getattr(self, name), defaults[name] or "none"
            if self.ckpt_format == "torch_dist" and given not in (1, None):
                raise ValueError(f"{flag(name)} {given}: a torch_dist checkpoint is not sharded; use {default}")
        if self.parts == "projector" and self.verify == "true":
            raise ValueError("--verify true: there is no whole model to verify with --parts projector; leave one out")
        _ = self.parallel  # refuses sizes below 1, also where they are not used

    def refuse(self, names: Sequence[str], kind: str) -> None:
        """Raise ValueError for the first of these settings that was given. `kind`: what they take effect in."""
        for name in names:
            if getattr(self, name) != self._defaults[name]:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: is for {kind}; leave it out")

    @property
    def _defaults(self) -> dict[str, Any]:
        return {setting.name: setting.default for setting in fields(self)}

    @property
    def sources(self) -> list[Path]:
        """Folders and files that are read."""
        given = (self.source_llm_ckpt_path, self.source_clip_ckpt_path, self.projector, self.hf_ckpt_path)
        return [path for path in given if path is not None]

    @property
    def added_tokens(self) -> list[str]:
        """Tokens that the tokenizer gets besides `<image>`."""
        names = ",".join(NEVA_TOKENS) if self.add_tokens == "neva" else self.add_tokens or ""
        return [name.strip() for name in names.split(",") if name.strip()]

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        found = re.fullmatch(SIZE, self.max_shard_size)
        assert found is not None, "refused above"
        number, unit = found.groups()
        return int(number) * 1000 ** ("KMGT".index(unit) + 1)

    def verifies(self, num_bytes: int) -> bool:
        """Whether a conversion of so many bytes of weights is verified."""
        return num_bytes < AUTO_VERIFY_BYTES if self.verify == "auto" else self.verify == "true"

    @property
    def parallel(self) -> Parallel:
        """Parallel sizes of the shards written."""
        return Parallel(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=self.virtual_pipeline_model_parallel_size,
        )


def describe_sources(conversion: Conversion) -> tuple[dict[str, Any], Llava]:
    """A LlavaConfig of the sources' own config.json, and what it says. Raises ValueError or OSError."""
    llm, clip = conversion.source_llm_ckpt_path, conversion.source_clip_ckpt_path
    for folder in (llm, clip):
        if folder is not None:
            refuse_adapter(folder)
            companions.check_json(folder)
            check_indices(folder)
    text = companions.read_json(llm)
    of_repository = llava_repository.is_repository(text)
    is_whole = text.get("model_type") == "llava" and not of_repository
    if (is_whole and clip is not None) or ((is_whole or of_repository) and conversion.projector is not None):
        name = "source_clip_ckpt_path" if is_whole and clip is not None else "projector"
        raise ValueError(f"{flag(name)} {getattr(conversion, name)}: {llm} is a whole LLaVA and has its own; give none")
    if is_whole:
        return text, _described(describe, text, llm)
    if clip is None:
        kind = "no whole LLaVA"
        if of_repository:
            kind = f"of the LLaVA repository, with {llava_repository.tower_name(text)} for its tower"
        raise ValueError(f"--source-clip-ckpt-path none: a vision tower's folder is needed, since {llm} is {kind}")
    tower = companions.read_json(clip)
    vision = _described(describe_vision_model, tower, clip)
    if of_repository:
        _described(llava_repository.check_settings, text, llm)
        llava_repository.check_tower(text, vision, clip)
        text = _described(llava_repository.text_config, text, llm)
    _described(describe_language_model, text, llm)
    config = llava_config(text, tower)
    return config, describe(config)


def read_record(folder: Path) -> dict[str, Any]:
    """What the import wrote about itself; {} where there is nothing. Raises ValueError for what it did not write."""
    if not (folder / companions.RECORD).is_file():
        return {}
    record = companions.read_json(folder, companions.RECORD)
    for name in ("language_model", "vision_tower", "projector", "precision"):
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f"{folder / companions.RECORD}: {name} is {short(record[name])}; expected text")
    added = record.get("added_tokens", [])
    if not isinstance(added, list) or not all(isinstance(token, str) for token in added):
        raise ValueError(f"{folder / companions.RECORD}: added_tokens is {short(added)}; expected a list of tokens")
    return record


def describe_checkpoint(conversion: Conversion) -> tuple[list[Path], dict[str, Any], Llava]:
    """Folders that carry what lies beside a Megatron-Core checkpoint's weights, its config.json, and what that says."""
    checkpoint = conversion.source_llm_ckpt_path
    companions.checkpoint_folder(checkpoint, conversion.ckpt_step)
    for name in ("source_clip_ckpt_path", "hf_ckpt_path"):
        folder = getattr(conversion, name)
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{flag(name)} {folder}: no such folder; leave it out where it is not needed")
    carriers = [path for path in (model_folder(checkpoint), conversion.hf_ckpt_path) if path is not None]
    carrier = next((path for path in carriers if (path / companions.CONFIG).is_file()), None)
    if carrier is None:
        raise FileNotFoundError(f"{checkpoint}: has no config.json; give --hf-ckpt-path, a LLaVA folder that has one")
    for folder in carriers:
        companions.check_json(folder)
        read_record(folder)
    config = companions.read_json(carrier)
    llava = _described(describe, config, carrier)
    llava.check_model_size(conversion.model_size)
    return carriers, config, llava


def stages_of(conversion: Conversion, llava: Llava) -> list[list[Stage]]:
    """What each pipeline rank is to hold. Raises ValueError for sizes that do not fit the model."""
    first, last = conversion.decoder_first_pipeline_num_layers, conversion.decoder_last_pipeline_num_layers
    if first is None and last is None:
        conversion.parallel.check(llava)
    else:
        conversion.parallel.check_tensor_parallel(llava)
    lengths = stage_lengths(llava.language.num_layers, conversion.pipeline_model_parallel_size, first, last)
    return pipeline_stages(lengths, conversion.virtual_pipeline_model_parallel_size)


def _described(describe: Callable[[dict[str, Any]], T], config: dict[str, Any], folder: Path) -> T:
    """`describe(config)`, with the file in the message when it raises."""
    try:
        return describe(config)
    except KeyError as error:
        raise ValueError(f"{folder / companions.CONFIG}: has no {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder / companions.CONFIG}: {error}") from None
