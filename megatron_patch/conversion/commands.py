"""The converter: Hugging Face to Megatron-Core, to other parallel sizes, and back.

What can be known from the arguments and the json files is checked first, and torch is imported after that: a mistake is
answered at once.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_patch.config.flags import parse
from megatron_patch.conversion import companions
from megatron_patch.conversion.settings import (
    DTYPES,
    NOT_FROM_HF,
    NOT_FROM_MCORE,
    Conversion,
    describe_checkpoint,
    describe_sources,
    read_record,
    stages_of,
)
from megatron_patch.families import llava_repository
from megatron_patch.families.hf_config import describe, exported_config
from megatron_patch.families.sizes import Llava, plain
from megatron_patch.files.meter import Meter
from megatron_patch.files.terminal import loading
from megatron_patch.files.unchanged import Unchanged
from megatron_patch.files.whole import check_target, written_aside

if TYPE_CHECKING:
    from megatron_patch.stores.reader import Reader


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is answered as Ctrl-C is."""


def _terminate(signum: int, frame: object) -> None:
    raise Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Run one conversion. Returns the exit code; a mistake is one line on stderr."""
    conversion = parse(Conversion, sys.argv[1:] if argv is None else argv)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        if conversion.mg2hf:
            export_hf(conversion)
        elif companions.is_checkpoint(conversion.source_llm_ckpt_path):
            reshard(conversion)
        else:
            import_hf(conversion)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"interrupted: {conversion.target_ckpt_path} was not written", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def import_hf(conversion: Conversion) -> None:
    """Hugging Face's language model and vision tower, or a whole LLaVA -> Megatron-Core shards."""
    conversion.refuse(NOT_FROM_HF, "a Megatron-Core checkpoint")
    llm, clip = conversion.source_llm_ckpt_path, conversion.source_clip_ckpt_path
    read = Unchanged([llm, clip, conversion.projector])
    config, llava = describe_sources(conversion)
    llava.check_model_size(conversion.model_size)
    stages_of(conversion, llava)
    check_target(conversion.target_ckpt_path, conversion.sources)

    with loading():
        import torch

        from megatron_patch.conversion.plan import open_mcore, to_mcore
        from megatron_patch.conversion.sources import open_sources, with_rows
        from megatron_patch.data.preprocessor import check_crop, has_preprocessor, read_image_settings
        from megatron_patch.families.llava import rows
        from megatron_patch.stores.hf import save_tensors
        from megatron_patch.stores.hf_files import passed_over, weight_file

    dtype = getattr(torch, DTYPES[conversion.precision])
    if has_preprocessor(clip or llm):
        check_crop(clip or llm, read_image_settings(clip or llm), llava.vision.img_size)
    for folder in filter(None, (llm, clip)):
        for name in passed_over(folder):
            print(f"{folder}: {weight_file(folder).name} is the model, as for transformers; {name} is not read")
    sources = open_sources(llava, llm, clip, conversion.projector, conversion.seed)
    num_bytes = _num_bytes(conversion, llava)
    with written_aside(conversion.target_ckpt_path, num_bytes) as folder:
        llava = _write_companions(conversion, folder, config, llava)
        source = with_rows(sources.reader, llava, llava.language.vocab_size)
        mcore = to_mcore(rows(llava), source, sources.unused, dtype)
        save_tensors({name: source[name] for name in sources.unused}, folder / companions.UNUSED)
        _write_mcore(conversion, folder, mcore, llava, sources.files)
        if conversion.verifies(num_bytes):
            with loading():
                from megatron_patch.conversion.verify import prove

            prove(conversion, folder, llava, source, open_mcore(folder, llava))
        read.check()
    print(_wrote(conversion))


def reshard(conversion: Conversion) -> None:
    """A Megatron-Core checkpoint, shards or torch_dist -> shards at other parallel sizes, or in another type."""
    conversion.refuse(NOT_FROM_MCORE, "an import from Hugging Face")
    if conversion.verify == "true":
        raise ValueError("--verify true: is for conversions from and to Hugging Face; a manifest checks resharding")
    read = _weights_of(conversion)
    carriers, _, llava = describe_checkpoint(conversion)
    stages_of(conversion, llava)
    check_target(conversion.target_ckpt_path, conversion.sources)

    with loading():
        import torch

        from megatron_patch.conversion.plan import open_mcore
        from megatron_patch.stores.reader import Views

    dtype = getattr(torch, DTYPES[conversion.precision])
    saved = open_mcore(conversion.source_llm_ckpt_path, llava, not conversion.no_check, conversion.ckpt_step)
    mcore = Views({name: saved.view(name).to(dtype) for name in saved}, saved)
    files = {source.path for name in mcore for source in mcore.view(name).sources}
    with written_aside(conversion.target_ckpt_path, _num_bytes(conversion, llava)) as folder:
        for source in reversed(carriers):
            companions.copy_companions(source, folder)
        _write_mcore(conversion, folder, mcore, llava, [path for path in files if path is not None])
        read.check()
    print(_wrote(conversion))


def export_hf(conversion: Conversion) -> None:
    """A Megatron-Core checkpoint -> LlavaForConditionalGeneration, as transformers 4.57 and 5 open it."""
    read = _weights_of(conversion)
    carriers, config, llava = describe_checkpoint(conversion)
    check_target(conversion.target_ckpt_path, conversion.sources)

    with loading():
        import torch

        from megatron_patch.conversion.plan import open_mcore, to_hf
        from megatron_patch.conversion.sources import open_unused
        from megatron_patch.families.llava import hub_name, rows
        from megatron_patch.stores.hf import HfReader
        from megatron_patch.stores.mm_projector import write_mm_projector
        from megatron_patch.stores.reader import Joined, Views

    dtype = getattr(torch, DTYPES[conversion.precision])
    mcore = open_mcore(conversion.source_llm_ckpt_path, llava, not conversion.no_check, conversion.ckpt_step)
    weights = to_hf(rows(llava), mcore, dtype)
    if conversion.parts == "projector":
        with written_aside(conversion.target_ckpt_path) as folder:
            write_mm_projector(folder, weights)
            read.check()
        print(f"wrote {conversion.target_ckpt_path}: the projector, {conversion.precision}")
        return
    unused = open_unused(llava, carriers, conversion.source_clip_ckpt_path, check=not conversion.no_check)
    unused = Views({name: unused.view(name).to(dtype) for name in unused}, unused)
    weights = Joined([weights, unused])
    num_bytes = sum(weights.view(name).nbytes for name in weights)
    with written_aside(conversion.target_ckpt_path, num_bytes * (1 + (conversion.parts == "true"))) as folder:
        for source in reversed(carriers):
            companions.copy_companions(source, folder, companions.EXPORTED)
        config = companions.without_code(config)
        _write_export(conversion, folder, config, llava, weights)
        if conversion.parts == "true":
            _write_parts(conversion, folder, config, llava, weights, carriers)
        parity = None
        if conversion.verifies(num_bytes):
            with loading():
                from megatron_patch.conversion.verify import prove

            hf = HfReader(folder, partial(hub_name, llava))
            parity = prove(conversion, folder, llava, hf, mcore)
        _write_card(conversion, folder, llava, carriers, parity)
        read.check()
    print(f"wrote {conversion.target_ckpt_path}: LlavaForConditionalGeneration, {conversion.precision}")


def _weights_of(conversion: Conversion) -> Unchanged:
    """The files of weights of a Megatron-Core checkpoint. What lies beside them a run may write again."""
    target = companions.checkpoint_folder(conversion.source_llm_ckpt_path, conversion.ckpt_step)
    return Unchanged([target, *target.glob("mp_rank_*"), conversion.source_clip_ckpt_path])


def _num_bytes(conversion: Conversion, llava: Llava) -> int:
    """Size of the shards to be written."""
    import torch

    from megatron_patch.conversion.plan import num_bytes_written

    dtype = getattr(torch, DTYPES[conversion.precision])
    sizes = conversion.parallel
    return num_bytes_written(llava, sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size, dtype)


def _write_mcore(conversion: Conversion, folder: Path, mcore: Reader, llava: Llava, files: list[Path]) -> None:
    """`files`: where the weights come from."""
    from megatron_patch.conversion.plan import write_dist, write_shards
    from megatron_patch.stores.manifest import identity

    write = write_dist
    if conversion.ckpt_format == "torch":
        write = partial(
            write_shards,
            tp_size=conversion.tensor_model_parallel_size,
            stages=stages_of(conversion, llava),
        )
    with Meter(_num_bytes(conversion, llava), "B") as meter:
        write(folder, mcore, llava, args=_args(conversion, llava), source=identity(files), progress=meter.add)


def _wrote(conversion: Conversion) -> str:
    what = f"TP {conversion.tensor_model_parallel_size} x PP {conversion.pipeline_model_parallel_size}"
    if conversion.ckpt_format != "torch":
        what = conversion.ckpt_format
    return f"wrote {conversion.target_ckpt_path}: {what}, {conversion.precision}"


def _write_companions(conversion: Conversion, folder: Path, config: dict[str, Any], llava: Llava) -> Llava:
    """Everything beside the shards. Returns the sizes, with the image token's id and rows for new tokens."""
    from megatron_patch.conversion.card import versions
    from megatron_patch.data.prompts import IMAGE
    from megatron_patch.data.tokenizer_files import install_tokenizer

    llm, clip = conversion.source_llm_ckpt_path, conversion.source_clip_ckpt_path
    try:
        ids = install_tokenizer(llm, folder, conversion.added_tokens, llava.language.vocab_size)
    except (ValueError, OSError):
        raise
    except Exception as error:  # transformers reads settings of other types, and stumbles when it tokenizes
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{llm}: its tokenizer cannot be used ({why}); copy its files again") from None
    vocab_size = max([llava.language.vocab_size, *(ids[token] + 1 for token in conversion.added_tokens)])
    if vocab_size > llava.language.vocab_size:
        config = {**config, "text_config": {**config["text_config"], "vocab_size": vocab_size}}
    config = companions.without_code({**config, "image_token_index": ids[IMAGE]})
    llava = describe(config)
    companions.write_json(folder, companions.CONFIG, config)
    companions.copy_companions(llm, folder / companions.SOURCE_TOKENIZER, companions.IN_SOURCE_TOKENIZER)
    companions.copy_companions(llm, folder, (companions.GENERATION_CONFIG,))
    source = companions.read_json(llm)
    of_repository = llava_repository.is_repository(source)
    companions.write_preprocessor(clip or llm, folder)
    companions.complete_processor(folder, llava.vision)
    if of_repository and llava_repository.pads(source):
        companions.write_preprocessor(folder, folder, pad=True)
    companions.remove_code(folder)
    companions.remove_code(folder / companions.SOURCE_TOKENIZER)
    name, own = conversion.prompt_format, False
    if name == "auto" and (of_repository or clip is None):
        own = True
        if of_repository and llava.language.family.name == "llama":
            name = "v1"  # the LLaVA repository's default for what is no Mistral
    _write_chat_template(name, folder, llm, llava, own=own)
    new = f"new, seed {conversion.seed}"
    record = {
        "language_model": str(llm),
        "vision_tower": str(clip or llm),
        "projector": str(conversion.projector or (new if clip and not of_repository else llm)),
        "precision": conversion.precision,
        "added_tokens": conversion.added_tokens,
        "versions": versions(),
    }
    companions.write_json(folder, companions.RECORD, record)
    return llava


def _write_export(conversion: Conversion, folder: Path, config: dict[str, Any], llava: Llava, weights: Reader) -> None:
    """The whole LLaVA: config.json and what is beside it, and the weights."""
    from megatron_patch.conversion.sources import with_rows
    from megatron_patch.stores.hf import HfWriter

    vocab_size = _exported_vocab_size(llava)
    writer = HfWriter(folder, conversion.max_shard_bytes)
    for name, view in with_rows(weights, llava, vocab_size).views.items():
        writer.add(name, view)
    # What reads a tokenizer takes as long to import as gigabytes to copy.
    with ThreadPoolExecutor(max_workers=1) as pool, Meter(writer.total_size, "B") as meter:
        described = pool.submit(_describe_export, conversion, folder, config, llava, vocab_size)

        def update(num_bytes: int) -> None:
            if described.done():
                described.result()
            meter.add(num_bytes)

        writer.close(update)
        described.result()


def _describe_export(
    conversion: Conversion, folder: Path, config: dict[str, Any], llava: Llava, vocab_size: int
) -> None:
    """What is beside the weights of an export, which may be written meanwhile. `vocab_size`: rows of its embedding."""
    from megatron_patch.conversion.generation_config import write_generation
    from megatron_patch.data.prompts import find_end, find_format
    from megatron_patch.data.tokenize import load_tokenizer
    from megatron_patch.data.tokenizer_files import complete_tokenizer

    complete_tokenizer(folder, vocab_size)
    config = exported_config(config, llava, vocab_size, DTYPES[conversion.precision])
    companions.complete_processor(folder, llava.vision)
    companions.remove_code(folder)
    if conversion.prompt_format != "auto" or not (folder / companions.CHAT_TEMPLATE).is_file():
        _write_chat_template(conversion.prompt_format, folder, folder, llava)
    tokenizer = load_tokenizer(folder)
    end = find_end(find_format("auto", folder, llava.language.family.name, tokenizer), tokenizer)
    companions.write_json(folder, companions.CONFIG, write_generation(folder, config, tokenizer, end))


def _write_parts(
    conversion: Conversion,
    folder: Path,
    config: dict[str, Any],
    llava: Llava,
    weights: Reader,
    carriers: Sequence[Path],
) -> None:
    """Language model, vision tower and projector by themselves, the language model with its source's tokenizer."""
    from megatron_patch.conversion.parts import LANGUAGE_MODEL, write_parts
    from megatron_patch.data.tokenizer_files import remove_image_token
    from megatron_patch.stores.mm_projector import write_mm_projector

    write_mm_projector(folder, weights)
    tower_class, dtype = llava.vision.family.hf_class, DTYPES[conversion.precision]
    write_parts(folder, weights, config, tower_class, dtype, conversion.max_shard_bytes)
    kept = next((f for f in (path / companions.SOURCE_TOKENIZER for path in carriers) if f.is_dir()), None)
    added = any(read_record(path).get("added_tokens") for path in carriers)
    if kept is not None and not added:
        companions.copy_companions(kept, folder / LANGUAGE_MODEL, companions.IN_SOURCE_TOKENIZER)
        companions.remove_code(folder / LANGUAGE_MODEL)
        return
    companions.copy_companions(folder, folder / LANGUAGE_MODEL, companions.TOKENIZER)
    if not added:  # else <image> has a row among the others
        remove_image_token(folder / LANGUAGE_MODEL)


def _write_card(
    conversion: Conversion, folder: Path, llava: Llava, carriers: Sequence[Path], parity: dict[str, Any] | None
) -> None:
    from megatron_patch.conversion.card import model_card

    record = next((record for record in map(read_record, carriers) if record), {})
    (folder / companions.CARD).write_text(model_card(llava, record, conversion.precision, parity), encoding="utf-8")


def _write_chat_template(name: str, folder: Path, source: Path, llava: Llava, *, own: bool = False) -> None:
    """`name`: a prompt format. `source`: says which one `auto` is. `own`: that has a whole LLaVA's, which stays."""
    from megatron_patch.data.tokenizer_files import template_for

    template = template_for(name, source, folder, llava.language.family.name, own=own)
    (folder / companions.CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def _exported_vocab_size(llava: Llava) -> int:
    """Rows of the exported embedding: transformers looks the image token up before it puts the image there."""
    size, needed = llava.language.vocab_size, llava.image_token_id + 1
    return size if needed <= size else math.ceil(needed / 64) * 64


def _args(conversion: Conversion, llava: Llava) -> dict[str, Any]:
    """What Megatron-LM keeps as `args` in a shard: plain values, so that it loads with weights_only."""
    padded = llava.language.padded_vocab_size(conversion.tensor_model_parallel_size)
    sizes = {**plain(llava.language), "vision": plain(llava.vision)}
    sizes["add_qkv_bias"] = llava.language.family.has("linear_qkv.bias")
    return {**sizes, "padded_vocab_size": padded, "params_dtype": DTYPES[conversion.precision]}
