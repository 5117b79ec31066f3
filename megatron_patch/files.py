"""Names of files beside the weights, and of one variable, that more than one part of the package reads or writes."""

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

STORE = "MEGATRON_PATCH_STORE"
"""Environment variable that the launcher gives its ranks, and nobody else: where they find each other. It is
`file://PATH` on one machine, in a folder of the launcher's alone, so that nothing listens; `env://`, torchrun's own
variables, on several."""
