"""Names of files and folders that more than one part of the package reads or writes, each once."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"

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
CHAT_TEMPLATE = "chat_template.jinja"
MORE_CHAT_TEMPLATES = "additional_chat_templates"
OLD_CHAT_TEMPLATE = "chat_template.json"  # as processors kept it before transformers 4.52
RUN_CONFIG = "run_config.json"  # a run's settings, in each of its checkpoints
MANIFEST = "manifest.json"  # what was written: beside the shards of a dataset, of a model's weights
COMMON = "common.pt"  # what is no tensor, in a torch_dist checkpoint

TRAINING = "training"
"""Beside a rank's error file as long as it trains: found by a launcher that a signal ended, the run was not saved."""

STORE = "MEGATRON_PATCH_STORE"
"""Environment variable that the launcher gives its ranks, and nobody else: where they find each other. It is
`file://PATH` on one machine, in a folder of the launcher's alone, so that nothing listens; `env://`, torchrun's own
variables, on several."""


def is_iteration(folder: Path) -> bool:
    """Whether `folder` itself holds the weights of a Megatron-Core checkpoint: one iteration of a run, or a release."""
    return (folder / ".metadata").is_file() or any(folder.glob("mp_rank_*"))


def model_folder(checkpoint: Path) -> Path:
    """The folder with config.json, tokenizer and processor of a checkpoint, which may be one iteration of a run."""
    if (checkpoint / "config.json").exists() or not is_iteration(checkpoint):
        return checkpoint
    return checkpoint.resolve().parent  # of a link, beside what it leads to
