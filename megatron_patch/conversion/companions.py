"""What lies beside the weights: tracker, config, tokenizer, processor, and the tensors that the network does not use.

A Megatron-Core checkpoint of ours is a Hugging Face LLaVA's folder with other weights, so that transformers opens its
config and processor, and everything that the way back needs is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_patch.data.preprocessor import (
    NESTED,
    has_preprocessor,
    preprocessor_of,
    read_image_settings,
    read_preprocessor,
)
from megatron_patch.families.hf_config import preprocessor_config, processor_config
from megatron_patch.families.sizes import VisionModel
from megatron_patch.files import json_object
from megatron_patch.files.marks import beside
from megatron_patch.files.names import (
    CHAT_TEMPLATE,
    CONFIG,
    MORE_CHAT_TEMPLATES,
    OLD_CHAT_TEMPLATE,
    PREPROCESSOR,
    PROCESSOR,
    TOKENIZER,
    TOKENIZER_CONFIG,
    is_iteration,
)

TRACKER = "latest_checkpointed_iteration.txt"
GENERATION_CONFIG = "generation_config.json"
TEMPLATE = "chat_template"  # a key
CODE = ("auto_map", "custom_pipelines", "custom_generate")
"""Keys that name Python files."""
UNUSED = "unused.safetensors"
RECORD = "conversion.json"
PARITY = "parity.json"
CARD = "README.md"
# The source's tokenizer as it was, before `<image>` came into it.
SOURCE_TOKENIZER = "source_tokenizer"
IN_SOURCE_TOKENIZER = (*TOKENIZER, CHAT_TEMPLATE, OLD_CHAT_TEMPLATE, f"{MORE_CHAT_TEMPLATES}/*.jinja")
EXPORTED = (CONFIG, GENERATION_CONFIG, PREPROCESSOR, PROCESSOR, CHAT_TEMPLATE, *TOKENIZER)
FILES = (*EXPORTED, UNUSED, RECORD, *(f"{SOURCE_TOKENIZER}/{name}" for name in IN_SOURCE_TOKENIZER))


def copy_companions(source: Path, target: Path, names: tuple[str, ...] = FILES) -> None:
    """Copy these files (or patterns), as far as `source` has them, into `target`, which is made where it is missing.

    Each file is whole or absent at any time; what is the same already is written again. Raises OSError.
    """
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    if source.resolve() == target.resolve():
        return
    for path in (path for name in names for path in sorted(source.glob(name))):
        if path.is_file():
            final = target / path.relative_to(source)
            final.parent.mkdir(parents=True, exist_ok=True)
            aside = beside(final)
            try:
                shutil.copyfile(path, aside)
                os.replace(aside, final)
            finally:
                aside.unlink(missing_ok=True)


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a Megatron-Core checkpoint, or one iteration of it."""
    return (Path(folder) / TRACKER).is_file() or is_iteration(Path(folder))


def checkpoint_folder(folder: Path, step: int | None = None) -> Path:
    """The folder of the iteration (or release) that `folder`'s tracker file names, or of iteration `step`.

    It may be `folder` itself. Raises FileNotFoundError or ValueError, one line, for a tracker that is missing, empty,
    garbage or points nowhere, and for an iteration that is not there.
    """
    folder = Path(folder)
    tracker = folder / TRACKER
    if step is not None:
        target = folder / f"iter_{step:07d}"
        if not target.is_dir():
            there = ", ".join(sorted(path.name for path in folder.glob("iter_" + 7 * "[0-9]"))) or "none"
            raise FileNotFoundError(f"--ckpt-step {step}: {target} is missing; there are: {there}")
        return target
    if not tracker.is_file() and is_iteration(folder):
        return folder
    if not tracker.is_file():
        raise FileNotFoundError(f"{tracker}: missing; expected the folder of a Megatron-Core checkpoint")
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not re.fullmatch(r"[0-9]{1,12}", text):
        raise ValueError(f"{tracker}: holds {text[:40]!r}; expected an iteration's number, 0 or more, or release")
    target = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not target.is_dir():
        raise FileNotFoundError(f"{target}: missing, though {TRACKER} names {text}; copy the checkpoint again")
    return target


def write_preprocessor(source: Path, folder: Path, pad: bool = False) -> None:
    """Write `source`'s image transform, if it has one, as `folder`/preprocessor_config.json. Raises ValueError.

    `pad`: with LLaVA's padding before it.
    """
    if has_preprocessor(source):
        settings = read_image_settings(source, "pad" if pad else "auto")
        write_json(folder, PREPROCESSOR, preprocessor_of(settings, read_preprocessor(source)))


def complete_processor(folder: Path, model: VisionModel) -> None:
    """Write what a processor needs and no source had. The image transform stands in preprocessor_config.json alone."""
    write_preprocessor(folder, folder)
    if not (folder / PREPROCESSOR).is_file():
        write_json(folder, PREPROCESSOR, preprocessor_config(model))
    processor = read_json(folder, PROCESSOR) if (folder / PROCESSOR).is_file() else processor_config(model)
    write_json(folder, PROCESSOR, {name: value for name, value in processor.items() if name != NESTED})


def read_json(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """A json file that holds an object. Raises FileNotFoundError or ValueError, one line that names the file."""
    return json_object.read_json(Path(folder) / name)


def check_json(folder: Path) -> None:
    """Raise ValueError, one line that names the file, where a json file beside the weights holds no object."""
    for name in (*FILES, OLD_CHAT_TEMPLATE):
        if name.endswith(".json") and (Path(folder) / name).is_file():
            read_json(folder, name)


def write_json(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write a json file in Hugging Face's style."""
    (Path(folder) / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def without_code(value: Any) -> Any:
    """Settings, at any depth, without the names of Python files that transformers would load with a folder."""
    if isinstance(value, dict):
        return {name: without_code(part) for name, part in value.items() if name not in CODE}
    return [without_code(part) for part in value] if isinstance(value, list) else value


def remove_code(folder: Path) -> None:
    """Take such names out of a folder's settings, and a chat template that would stand before chat_template.jinja."""
    for name in (PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG, GENERATION_CONFIG):
        if (Path(folder) / name).is_file():
            content = read_json(folder, name)
            kept = {key: value for key, value in without_code(content).items() if name != PROCESSOR or key != TEMPLATE}
            if kept != content:
                write_json(folder, name, kept)
