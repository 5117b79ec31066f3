"""Convert LLaVA between Hugging Face and Megatron-Core: `python convert.py --help`.

What can be known from the arguments and the json files is checked first, and torch is imported after that: a mistake is
answered at once.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from megatron_patch.arguments import parse
from megatron_patch.checkpoint import companions
from megatron_patch.checkpoint.output import check_target, written_aside
from megatron_patch.config import Llava, Parallel, Precision, PromptFormat
from megatron_patch.families.llava import describe, describe_language_model, describe_vision_model, parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_patch.checkpoint.reader import Reader

T = TypeVar("T")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Convert LLaVA between Hugging Face and Megatron-Core."""

    model_size: str = "auto"
    """Size of the language model, such as 7B, checked against its config.json; auto: not checked."""

    source_llm_ckpt_path: Path
    """Hugging Face folder of a Mistral or Llama; with --mg2hf true a Megatron-Core checkpoint, shards or torch_dist.
    With --mg2hf false such a checkpoint is cut anew."""

    source_clip_ckpt_path: Path | None = None
    """Hugging Face folder of a CLIP (whole, or its vision half). With --mg2hf true only where the checkpoint lacks the
    tower's unused last layer."""

    target_ckpt_path: Path
    """Folder for the result: new or empty. It appears when it is whole."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer of the shards written. A checkpoint is read at any size."""

    pipeline_model_parallel_size: int = 1
    """Stages that share the layers of the shards written."""

    mg2hf: bool = False
    """Direction; false: Hugging Face to Megatron-Core, true: Megatron-Core to Hugging Face."""

    precision: Precision = "bf16"
    """Type of the weights written."""

    hf_ckpt_path: Path | None = None
    """With --mg2hf true: a LLaVA's folder, for the config.json and tokenizer that the checkpoint does not carry."""

    prompt_format: PromptFormat = "auto"
    """Chat template that is written beside the weights; auto: the language model family's own, or the one there is."""

    no_check: bool = False
    """Read a Megatron-Core checkpoint without comparing it with its manifest.json."""

    seed: int = 1234
    """Seed of the new projector's weights."""

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ValueError(f"--precision {self.precision}: weights are kept as bf16, fp16 or fp32; use one of these")
        if not (self.mg2hf or self.reshards) and self.source_clip_ckpt_path is None:
            raise ValueError("--source-clip-ckpt-path none: a CLIP's folder is needed with --mg2hf false")
        _ = self.parallel  # refuses sizes below 1, also where they are not used

    @property
    def reshards(self) -> bool:
        """Whether both sides are Megatron-Core's."""
        return not self.mg2hf and (self.source_llm_ckpt_path / companions.TRACKER).is_file()

    @property
    def parallel(self) -> Parallel:
        """The cut of the shards written."""
        return Parallel(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one conversion. Returns the exit code; a mistake is one line on stderr."""
    conversion = parse(Conversion, sys.argv[1:] if argv is None else argv)
    try:
        if conversion.mg2hf:
            export_hf(conversion)
        elif conversion.reshards:
            reshard(conversion)
        else:
            import_hf(conversion)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def import_hf(conversion: Conversion) -> None:
    """Hugging Face's language model and CLIP -> Megatron-Core shards with a new projector."""
    text = companions.read_json(conversion.source_llm_ckpt_path)
    tower = companions.read_json(conversion.source_clip_ckpt_path)
    # The image token's id is known once the tokenizer has it; nothing that is checked here depends on it.
    llava = Llava(
        language=_described(describe_language_model, text, conversion.source_llm_ckpt_path),
        vision=_described(describe_vision_model, tower, conversion.source_clip_ckpt_path),
        image_token_id=0,
    )
    llava.check_model_size(conversion.model_size)
    llava.check_parallel(conversion.parallel)
    check_target(conversion.target_ckpt_path)

    import torch

    from megatron_patch.checkpoint.hf import save_tensors

    dtype = getattr(torch, DTYPES[conversion.precision])
    mcore, unused, files = _open_sources(conversion, llava, dtype)
    with written_aside(conversion.target_ckpt_path, _num_bytes(conversion, llava)) as folder:
        llava = _write_companions(conversion, folder, llava, text, tower)
        save_tensors(unused, folder / companions.UNUSED)
        _write_shards(conversion, folder, mcore, llava, files)


def reshard(conversion: Conversion) -> None:
    """A Megatron-Core checkpoint, shards or torch_dist -> shards at other parallel sizes, or in another type."""
    carriers, _, llava = _described_checkpoint(conversion)
    llava.check_parallel(conversion.parallel)
    check_target(conversion.target_ckpt_path)

    import torch

    from megatron_patch.checkpoint.convert import open_mcore
    from megatron_patch.checkpoint.reader import Views

    dtype = getattr(torch, DTYPES[conversion.precision])
    saved = open_mcore(conversion.source_llm_ckpt_path, llava, check=not conversion.no_check)
    mcore = Views({name: saved.view(name).to(dtype) for name in saved}, saved.source)
    files = {source.path for name in mcore for source in mcore.view(name).sources}
    with written_aside(conversion.target_ckpt_path, _num_bytes(conversion, llava)) as folder:
        for source in reversed(carriers):
            companions.copy_companions(source, folder)
        _write_shards(conversion, folder, mcore, llava, [path for path in files if path is not None])


def _num_bytes(conversion: Conversion, llava: Llava) -> int:
    """Size of the shards to be written."""
    import torch

    from megatron_patch.checkpoint.convert import num_bytes_written

    dtype = getattr(torch, DTYPES[conversion.precision])
    sizes = conversion.parallel
    return num_bytes_written(llava, sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size, dtype)


def _write_shards(conversion: Conversion, folder: Path, mcore: Reader, llava: Llava, files: list[Path]) -> None:
    """Write the shards, and say so. `files`: where the weights come from."""
    from megatron_patch.checkpoint.convert import write_shards
    from megatron_patch.checkpoint.manifest import identity

    tp_size, pp_size = conversion.tensor_model_parallel_size, conversion.pipeline_model_parallel_size
    with _progress(_num_bytes(conversion, llava)) as bar:
        write_shards(
            folder,
            mcore,
            llava,
            tp_size=tp_size,
            pp_size=pp_size,
            args=_args(conversion, llava),
            source=identity(files),
            progress=bar.update,
        )
    print(f"wrote {conversion.target_ckpt_path}: TP {tp_size} x PP {pp_size}, {conversion.precision}")


def export_hf(conversion: Conversion) -> None:
    """A Megatron-Core checkpoint -> LlavaForConditionalGeneration, as transformers 4.57 and 5 open it."""
    checkpoint = conversion.source_llm_ckpt_path
    carriers, config, llava = _described_checkpoint(conversion)
    check_target(conversion.target_ckpt_path)

    import torch

    from megatron_patch.checkpoint.convert import append_mean_rows, cast, open_mcore, to_hf
    from megatron_patch.checkpoint.hf import HfWriter
    from megatron_patch.families.llava import rows

    dtype = getattr(torch, DTYPES[conversion.precision])
    table = rows(llava)
    weights = to_hf(table, open_mcore(checkpoint, llava, check=not conversion.no_check), dtype)
    unused = _unused_for_export(conversion, llava, carriers)
    vocab_size = _exported_vocab_size(llava)
    num_bytes = sum(math.prod(weights.shape(name)) for name in weights) * dtype.itemsize
    with written_aside(conversion.target_ckpt_path, num_bytes) as folder:
        for source in reversed(carriers):
            companions.copy_companions(source, folder)
        (folder / companions.UNUSED).unlink(missing_ok=True)
        companions.make_tokenizer_portable(folder)
        config = companions.hf_config(config, llava, vocab_size, DTYPES[conversion.precision])
        companions.write_json(folder, companions.CONFIG, config)
        _complete_processor(folder, llava)
        if conversion.prompt_format != "auto" or not (folder / companions.CHAT_TEMPLATE).is_file():
            _write_chat_template(conversion, folder, llava)
        tables = {name for weight in table if weight.layout == "vocab" for name in weight.hf}
        writer = HfWriter(folder)
        for name in weights:
            view = weights.view(name)
            writer.add(name, append_mean_rows(view, vocab_size) if name in tables else view)
        for name, tensor in unused.items():
            writer.add(name, cast(tensor, dtype, name))
        with _progress(writer.total_size) as bar:
            writer.close(bar.update)
    print(f"wrote {conversion.target_ckpt_path}: LlavaForConditionalGeneration, {conversion.precision}")


def _described_checkpoint(conversion: Conversion) -> tuple[list[Path], dict[str, Any], Llava]:
    """Folders that carry what lies beside a Megatron-Core checkpoint's weights, its config.json, and what that says."""
    checkpoint = conversion.source_llm_ckpt_path
    companions.checkpoint_folder(checkpoint)
    carriers = [path for path in (checkpoint, conversion.hf_ckpt_path) if path is not None]
    carrier = next((path for path in carriers if (path / companions.CONFIG).is_file()), None)
    if carrier is None:
        raise FileNotFoundError(f"{checkpoint}: has no config.json; give --hf-ckpt-path, a LLaVA folder that has one")
    config = companions.read_json(carrier)
    llava = _described(describe, config, carrier)
    llava.check_model_size(conversion.model_size)
    return carriers, config, llava


def _open_sources(
    conversion: Conversion, llava: Llava, dtype: torch.dtype
) -> tuple[Reader, dict[str, Tensor], list[Path]]:
    """The whole megatron.core model, lazily, the sources' tensors that it does not use, and the sources' files."""
    from megatron_patch.checkpoint.convert import new_projector, to_mcore
    from megatron_patch.checkpoint.hf import HfReader
    from megatron_patch.checkpoint.reader import InMemory, Joined
    from megatron_patch.families.llava import rows, unused_names

    language, tower, projector = parts(llava)
    models = [
        HfReader(conversion.source_llm_ckpt_path, language.hub_name),
        HfReader(conversion.source_clip_ckpt_path, tower.hub_name),
    ]
    source = Joined([*models, InMemory(new_projector(projector.rows(), conversion.seed), "the new projector")])
    unused = unused_names(llava)
    kept = {name: source[name] for name in unused}
    return to_mcore(rows(llava), source, unused, dtype), kept, [path for model in models for path in model.files()]


def _write_companions(
    conversion: Conversion, folder: Path, llava: Llava, text: dict[str, Any], tower: dict[str, Any]
) -> Llava:
    """Everything beside the shards. Returns `llava` with the image token's id, which the tokenizer gives."""
    from megatron_patch.data.tokenize import install_tokenizer

    llava = dataclasses.replace(llava, image_token_id=install_tokenizer(conversion.source_llm_ckpt_path, folder))
    config = companions.llava_config(text, tower, llava.image_token_id)
    companions.write_json(folder, companions.CONFIG, config)
    companions.copy_companions(conversion.source_llm_ckpt_path, folder, (companions.GENERATION_CONFIG,))
    companions.copy_companions(conversion.source_clip_ckpt_path, folder, (companions.PREPROCESSOR,))
    _complete_processor(folder, llava)
    _write_chat_template(conversion, folder, llava)
    return llava


def _complete_processor(folder: Path, llava: Llava) -> None:
    """Write what a processor needs and no source had."""
    if not (folder / companions.PREPROCESSOR).is_file():
        companions.write_json(folder, companions.PREPROCESSOR, companions.preprocessor_config(llava.vision))
    if not (folder / companions.PROCESSOR).is_file():
        companions.write_json(folder, companions.PROCESSOR, companions.processor_config(llava.vision))


def _write_chat_template(conversion: Conversion, folder: Path, llava: Llava) -> None:
    from megatron_patch.data.tokenize import chat_template, format_name

    name = format_name(conversion.prompt_format, llava.language.family)
    (folder / companions.CHAT_TEMPLATE).write_text(chat_template(name))


def _unused_for_export(conversion: Conversion, llava: Llava, carriers: list[Path]) -> dict[str, Tensor]:
    """The tensors that transformers' model has and megatron.core's has not: as the import kept them, or CLIP's."""
    from megatron_patch.checkpoint.hf import HfReader, load_safetensors
    from megatron_patch.families.llava import unused_names

    names = unused_names(llava)
    path = next((path / companions.UNUSED for path in carriers if (path / companions.UNUSED).is_file()), None)
    if path is not None:
        kept = load_safetensors(path, check=not conversion.no_check)
    elif conversion.source_clip_ckpt_path is not None:
        _, tower, _ = parts(llava)
        kept = path = HfReader(conversion.source_clip_ckpt_path, tower.hub_name)
    else:
        raise FileNotFoundError(
            f"{carriers[0] / companions.UNUSED}: missing; it holds the tower's last layer, which no training uses; "
            "give CLIP's folder with --source-clip-ckpt-path"
        )
    for name in names:
        if name not in kept:
            raise ValueError(f"{path}: has no {name}; give another --source-clip-ckpt-path or copy it again")
    return {name: kept[name] for name in names}


def _exported_vocab_size(llava: Llava) -> int:
    """Rows of the exported embedding: transformers looks the image token up before it puts the picture there."""
    size, needed = llava.language.vocab_size, llava.image_token_id + 1
    return size if needed <= size else math.ceil(needed / 64) * 64


def _args(conversion: Conversion, llava: Llava) -> dict[str, Any]:
    """What Megatron-LM keeps as `args` in a shard: plain values, so that it loads with weights_only."""
    padded = llava.language.padded_vocab_size(conversion.tensor_model_parallel_size)
    sizes = {**dataclasses.asdict(llava.language), "vision": dataclasses.asdict(llava.vision)}
    return {**sizes, "padded_vocab_size": padded, "params_dtype": DTYPES[conversion.precision]}


def _described(describe: Callable[[dict[str, Any]], T], config: dict[str, Any], folder: Path) -> T:
    """`describe(config)`, with the file in the message when it raises."""
    try:
        return describe(config)
    except KeyError as error:
        raise ValueError(f"{folder / companions.CONFIG}: has no {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder / companions.CONFIG}: {error}") from None


def _progress(num_bytes: int) -> tqdm:
    return tqdm(total=num_bytes, unit="B", unit_scale=True, desc="converting", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
