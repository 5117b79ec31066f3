"""What transformers' processor needs to treat texts and images as training did, written beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_patch.config.train import Config
from megatron_patch.data.preprocessor import preprocessor_of, read_image_settings, read_preprocessor
from megatron_patch.data.prompts import chat_template, find_format
from megatron_patch.data.tokenize import load_tokenizer
from megatron_patch.files.names import CHAT_TEMPLATE, PREPROCESSOR
from megatron_patch.files.whole import write_whole


def write_processor(config: Config, family: str, folder: Path) -> None:
    """Write a run's chat template, and its image transform where that is not the checkpoint's own, into `folder`.

    `family`: the language model's.
    """
    description = config.model.description
    if config.data.image_transform != "auto":
        settings = read_image_settings(description, config.data.image_transform)
        preprocessor = preprocessor_of(settings, read_preprocessor(description))
        write_whole(folder / PREPROCESSOR, json.dumps(preprocessor, indent=2) + "\n")
    tokenizer, marked = load_tokenizer(description), config.data.use_im_start_end
    name = find_format(config.data.prompt_format, description, family, tokenizer)
    template = chat_template(name, description, tokenizer, use_im_start_end=marked)
    write_whole(folder / CHAT_TEMPLATE, template)
