"""Files that more than one part of the package reads or writes: their names, and what is wrong with one."""

from __future__ import annotations

import re

TOKENIZER_CONFIG = "tokenizer_config.json"
# Everything of a tokenizer that transformers may read, except its chat template, which is not LLaVA's.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
OLD_CHAT_TEMPLATE = "chat_template.json"  # as processors kept it before transformers 4.52
COMMON = "common.pt"  # what is no tensor, in a torch_dist checkpoint

TRAINING = "training"
"""Beside a rank's error file as long as it trains: found by a launcher that a signal ended, the run was not saved."""


def why_not_loaded(error: BaseException) -> str:
    """What torch.load(weights_only=True) says of a file, on one line and without its advice to trust it."""
    named = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
    if named:
        return f"it names {named[1]}, which could run code"
    text = str(error).rpartition("WeightsUnpickler error: ")[2]  # all of it, where that is not in it
    text = re.sub("\x1b\\[[0-9;]*m", "", text).strip()
    return (text.splitlines() or [type(error).__name__])[0][:200]
