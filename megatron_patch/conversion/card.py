"""README.md of an export: what the model is, where it comes from, and how it was proven."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

from megatron_patch.families.sizes import Llava

PACKAGES = ("megatron-core", "transformers", "torch", "safetensors")


def versions() -> dict[str, str]:
    """The versions of what a conversion depends on."""
    return {package: version(package) for package in PACKAGES}


def model_card(llava: Llava, record: dict[str, Any], precision: str, parity: dict[str, Any] | None) -> str:
    """The text of README.md.

    `record`: what the import wrote about itself (conversion.json; {} where there is none). `parity`: parity.json.
    """
    language, vision = llava.language, llava.vision
    facts = {
        "Language model": _name(record.get("language_model")),
        "Vision tower": _name(record.get("vision_tower")),
        "Projector at the start": _name(record.get("projector")),
        "Sizes of the language model": f"{language.family.name}, {language.num_parameters / 1e6:,.0f} million "
        f"parameters, {language.num_layers} layers of {language.hidden_size}, {language.num_attention_heads} heads in "
        f"{language.num_query_groups} groups, vocabulary {language.vocab_size}"
        + (", tied embeddings" if language.share_embeddings_and_output_weights else ""),
        "Sizes of the tower": f"{vision.family.name}, {vision.num_layers} layers used, of {vision.hidden_size}, "
        f"{vision.img_size} pixels in patches of {vision.patch_dim}: {vision.num_image_tokens} positions per image",
        "Image token": f"`<image>`, id {llava.image_token_id}",
        "Tokens added": ", ".join(f"`{_plain(token, '<>|')}`" for token in _list(record.get("added_tokens")))
        or "none but `<image>`",
        "Precision": precision,
        "Converted with": ", ".join(f"{package} {number}" for package, number in versions().items()),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, megatron-core]
---

# LLaVA, exported from Megatron-Core

A `LlavaForConditionalGeneration` for transformers 4.57 and 5:

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="PATH OF THIS FOLDER")
image = {{"type": "image", "image": "PATH OR ADDRESS OF AN IMAGE"}}
messages = [{{"role": "user", "content": [image, {{"type": "text", "text": "What is this?"}}]}}]
print(ask(text=messages, max_new_tokens=64, return_full_text=False))
```

| | |
|---|---|
{rows}

## Proof

{_proof(parity)}
"""


def _name(source: Any) -> str:
    """Where weights come from, without the folders of this machine: a card is published."""
    text = source if isinstance(source, str) and source else "not recorded"
    return _plain(PurePath(text).name or text)


def _plain(text: Any, also: str = "") -> str:
    """A name from a file as one line of plain words, in which nothing is Markdown or HTML, or moves a cursor."""
    text = re.sub(rf"[^\w .,:+@()={also}-]", "?", str(text)[:200])
    return text.replace("|", "\\|")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _proof(parity: dict[str, Any] | None) -> str:
    if parity is None:
        return "Not verified: the conversion ran with `--verify false`, or the model was too large for `auto`."
    worst = max(parity["blocks"], key=lambda block: block["max_abs_difference"])
    lowest = min(block["cosine"] for block in parity["blocks"])
    return f"""The same image and prompt of {parity["num_positions"]} positions went through the Megatron-Core
model and through this one, in fp32, block by block ([parity.json](parity.json)):

| | |
|---|---|
| Largest difference of the logits | {parity["logits_max_abs_difference"]:.3g} |
| Same likeliest token | {parity["top1_agreement"]:.2%} of the positions |
| Largest difference after a block | {worst["max_abs_difference"]:.3g} ({worst["name"]}) |
| Lowest cosine after a block | {lowest:.9f} |"""
