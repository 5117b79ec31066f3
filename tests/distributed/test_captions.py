"""However the model is cut, it captions validation images as transformers does, and its weights have one norm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from megatron_patch.config.train import Config, Parallel
from megatron_patch.families.llava import read_config
from megatron_patch.training.captions import MAX_NEW_TOKENS, Caption, captioner
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.params_norm import params_norm
from tests import tiny_runs
from tests.distributed.ranks import run_ranks
from tests.tiny import LANGUAGE_SIZES
from tests.unit.data.samples import convert_folder, write_annotations, write_pretrain

COUNT = 3


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory) -> Path:
    """LLaVA-Pretrain's layout with images of noise, questions of different lengths; in it, its wds."""
    folder = tmp_path_factory.mktemp("pretrain") / "raw"
    entries = write_pretrain(folder, 30)
    noise = np.random.default_rng(1)
    for index, entry in enumerate(entries):
        picture = noise.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / entry["image"], "JPEG")
        entry["conversations"][0]["value"] = "<image>\n" + "What is it? " * (1 + index % 3)
    write_annotations(folder, entries)
    convert_folder(folder)
    return folder


@pytest.fixture(scope="module")
def expected(pretrain, hf) -> list[Caption]:
    """Transformers' captions of the val split's first samples, which are those of the last shards."""
    model, processor = LlavaForConditionalGeneration.from_pretrained(hf).eval(), AutoProcessor.from_pretrained(hf)
    captions = []
    for index in range(27, 27 + COUNT):
        question = "What is it? " * (1 + index % 3)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        picture = Image.open(pretrain / f"00000/{index:06d}.jpg")
        inputs = processor(text=prompt, images=picture, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)[0, inputs.input_ids.shape[1] :]
        image = processor.image_processor
        shown = image(picture, do_normalize=False, do_rescale=False, return_tensors="pt").pixel_values[0]
        said = processor.decode(ids, skip_special_tokens=True).strip()
        captions.append(Caption(f"{index:06d}", shown.to(torch.uint8), f"image number {index}", said))
    return captions


@pytest.fixture(scope="module")
def expected_norm(hf) -> float:
    """Of all weights but the tower's last layer, which is not used, and the vocabulary's padding."""
    squares = 0.0
    for name, weight in LlavaForConditionalGeneration.from_pretrained(hf).state_dict().items():
        if "encoder.layers.2." not in name and "post_layernorm" not in name:
            words = LANGUAGE_SIZES["vocab_size"] if "embed_tokens" in name or "lm_head" in name else None
            squares += weight[:words].double().square().sum().item()
    return squares**0.5


def config(mcore, pretrain, output, **changed) -> Config:
    made = tiny_runs.config(mcore, output, log_captions=COUNT, **changed)
    return replace(made, data=replace(made.data, data_path=pretrain / "wds", valid_data_path=pretrain / "wds"))


def caption(config: Config) -> tuple[list[Caption], float, bool]:
    """Captions, the weights' norm, and whether the model is to be trained after that."""
    llava = read_config(config.model.description)
    _, wrapped, _, _ = start_or_resume(config, llava)
    captions = captioner(config, llava)(wrapped)
    return captions, params_norm(wrapped), all(chunk.training for chunk in wrapped)


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        (1, {}),
        (2, {"tensor_model_parallel_size": 2}),
        (
            4,
            {
                "context_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
            },
        ),
    ],
    ids=["one process", "TP2+SP", "CP2xPP2xVPP2"],
)
def test_captions_equal_transformers(mcore, pretrain, expected, expected_norm, tmp_path, world_size, sizes):
    cut = Parallel(**sizes)
    assert len({caption.said for caption in expected}) > 1
    for captions, norm, is_training in run_ranks(
        caption, cut, world_size, config(mcore, pretrain, tmp_path, parallel=cut)
    ):
        for one, other in zip(captions, expected, strict=True):
            assert (one.key, one.reference, one.said) == (other.key, other.reference, other.said)
            assert torch.equal(one.image, other.image)
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        assert is_training, "validation gives the model back as it was"
