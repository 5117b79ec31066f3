"""Caption pictures with a LLaVA in Hugging Face's format. Nothing but transformers: this is the judge.

    python quickstart_caption.py MODEL PICTURES RESULT.json

PICTURES has LLaVA-Pretrain's layout. Every picture is captioned greedily; then once more with the pictures moved on by
one, so that each question meets another entry's picture: a model that looks at pictures now gives other captions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

BATCH_SIZE = 100
MAX_NEW_TOKENS = 24


def caption(model: Any, processor: Any, pictures: list[Image.Image], questions: list[str]) -> list[str]:
    """What the model says to each picture and question."""
    answers = []
    for start in range(0, len(pictures), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            for question in questions[batch]
        ]
        inputs = processor(text=prompts, images=pictures[batch], padding=True, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=model.config.text_config.eos_token_id,
            )
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def main() -> None:
    """Write what was expected and what was said, for every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("result", type=Path)
    args = parser.parse_args()

    model = LlavaForConditionalGeneration.from_pretrained(args.model).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    processor.tokenizer.padding_side = "left"
    processor.tokenizer.pad_token = processor.tokenizer.eos_token

    entries = json.loads((args.pictures / "blip_laion_cc_sbu_558k.json").read_text())
    pictures = [Image.open(args.pictures / entry["image"]).convert("RGB") for entry in entries]
    questions = [entry["conversations"][0]["value"].replace("<image>", "").strip() for entry in entries]
    said = caption(model, processor, pictures, questions)
    said_to_another = caption(model, processor, [*pictures[1:], pictures[0]], questions)
    result = [
        {"image": entry["image"], "expected": entry["conversations"][1]["value"], "said": own, "shuffled": other}
        for entry, own, other in zip(entries, said, said_to_another, strict=True)
    ]
    args.result.write_text(json.dumps(result, indent=1))
    exact = sum(row["said"] == row["expected"] for row in result)
    print(f"{exact} of {len(result)} captions exact: {args.result}")


if __name__ == "__main__":
    main()
