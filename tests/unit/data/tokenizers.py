"""Tokenizers that the tests encode with: one made here, and the real one of Mistral."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.data.prompts import prompt_format
from megatron_patch.data.tokenize import Encoded, encode
from tests.tiny import save_tokenizer

TOKENS = 16
TURNS = [("<image>\nWhat  is it?", "a red circle"), ("And its colour?", "red")]


def mistral_v3(folder: Path) -> Path:
    """The real tokenizer of Mistral-7B-Instruct-v0.3, which mistral-common ships: sentencepiece, no tokenizer.json."""
    mistral_common = pytest.importorskip("mistral_common", reason="it brings the real Mistral tokenizer")
    folder.mkdir()
    data = Path(mistral_common.__file__).parent / "data"
    shutil.copyfile(data / "mistral_instruct_tokenizer_240323.model.v3", folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "chat_template": "of no use"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CHAT_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<extra_id_0>", "<extra_id_1>", "<im_start>", "<im_end>"),
)


def tiny(folder: Path) -> Path:
    """Byte-level BPE in a tokenizer.json, with the tokens of every prompt format in it."""
    save_tokenizer(folder, 300)
    path = folder / "tokenizer.json"
    text = path.read_text()
    for index, name in enumerate(CHAT_TOKENS):
        text = text.replace(f"<unused_{index + 1}>", name)
    tokenizer = json.loads(text)
    for name in CHAT_TOKENS:
        token = {**tokenizer["added_tokens"][0], "id": tokenizer["model"]["vocab"][name], "content": name}
        tokenizer["added_tokens"].append(token)
    path.write_text(json.dumps(tokenizer))
    return folder


def encoded(turns: Sequence[tuple[str, str]], tokenizer: Any, name: str, length: int = 2000) -> Encoded:
    """A conversation in the prompt format of that name, an image as `TOKENS` placeholders."""
    pieces = prompt_format(name, tokenizer).pieces(turns)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return encode(pieces, tokenizer, image_token_id=image_token_id, num_image_tokens=TOKENS, max_length=length)
