"""The published script itself: from another folder, under sh and bash, with a space in every path."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, CLIPConfig, CLIPModel, LlavaForConditionalGeneration

from megatron_patch.conversion.commands import main
from megatron_patch.families.llava import hub_name, parts, read_config
from megatron_patch.stores.hf import HfReader
from tests.end_to_end.scripts import processor_seconds
from tests.tiny import VISION_SIZES, save_clip, save_llama, save_mistral

REPO = Path(__file__).parents[2]
FLAGS = (
    "model-size",
    "source-llm-ckpt-path",
    "source-clip-ckpt-path",
    "target-ckpt-path",
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "mg2hf",
    "precision",
    "hf-ckpt-path",
)
SCRIPT = REPO / "toolkits" / "model_checkpoints_convertor" / "llava" / "hf2mcore_convertor_llava.sh"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A working folder with a space in its name and two source models in it."""
    folder = tmp_path_factory.mktemp("my models")
    save_mistral(folder / "a mistral")
    save_clip(folder / "a clip")
    return folder


@pytest.fixture(autouse=True)
def _in_that_folder(monkeypatch, elsewhere):
    monkeypatch.chdir(elsewhere)


def convert(folder: Path, *arguments: object, shell: str = "bash") -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [shell, str(SCRIPT), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def scripted(folder: Path, *arguments: object, shell: str) -> None:
    result = convert(folder, *arguments, shell=shell)
    assert result.returncode == 0, result.stderr
    assert f"wrote {arguments[3]}: " in result.stdout


def converted(folder: Path, *arguments: object) -> Path:
    """What the script would do, in this process: importing torch and transformers takes most of its time."""
    flags = [f"--{name}={value}" for name, value in zip(FLAGS, arguments, strict=False)]
    assert main(flags + [str(word) for word in arguments[len(FLAGS) :]]) == 0
    return folder / str(arguments[3])


def source_tensors(folder: Path, llm: str = "a mistral", clip: str = "a clip") -> dict[str, torch.Tensor]:
    """The source models' tensors under the names that they have in a LLaVA."""
    language, tower, _ = parts(read_config(folder / "described"))
    return {**HfReader(folder / llm, language.hub_name), **HfReader(folder / clip, tower.hub_name)}


def exported_tensors(folder: Path) -> HfReader:
    return HfReader(folder, partial(hub_name, read_config(folder)))


@pytest.mark.parametrize(("tp", "pp", "shell"), [(1, 1, None), (2, 1, None), (4, 1, None), (2, 2, "bash")])
def test_round_trip_is_bit_exact(elsewhere, tp, pp, shell):
    """Every tensor of both sources comes back, those that megatron.core's model does not use included."""
    shards, back = f"shards {tp} {pp}", f"back {tp} {pp}"
    run = partial(scripted, shell=shell) if shell else converted
    run(elsewhere, "auto", "a mistral", "a clip", shards, tp, pp, "false", "fp32")
    names = sorted(path.name for path in (elsewhere / shards / "release").iterdir())
    expected = [f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") for t in range(tp) for p in range(pp)]
    assert names == ["manifest.json", *expected]
    assert (elsewhere / shards / "latest_checkpointed_iteration.txt").read_text().strip() == "release"

    run(elsewhere, "auto", shards, "none", back, tp, pp, "true", "fp32")
    check_export(elsewhere, shards, back)


def check_export(elsewhere, shards, back, clip="a clip"):
    shutil.copytree(elsewhere / shards, elsewhere / "described", dirs_exist_ok=True)
    exported, sources = exported_tensors(elsewhere / back), source_tensors(elsewhere, clip=clip)
    new = {name for name in exported if name.startswith("multi_modal_projector.")}
    assert set(exported) == set(sources) | new
    assert len(new) == 4
    for name, tensor in sources.items():
        found = exported[name]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert found.shape[0] == 320
            assert torch.allclose(found[300:], tensor.mean(0, keepdim=True), atol=1e-6)
            found = found[: len(tensor)]
        assert torch.equal(found, tensor), name


def test_transformers_opens_the_export(elsewhere, hf, mcore):
    """Weights without a missing or unexpected key; processor, tokenizer and chat template; a caption comes out."""
    model, info = LlavaForConditionalGeneration.from_pretrained(hf, output_loading_info=True)
    assert not any(info.values()), info
    names = HfReader(hf)
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert "vision_tower.vision_model.post_layernorm.weight" in names
    assert model.config.text_config.rope_parameters["rope_theta"] == 500000.0
    assert model.config.text_config.sliding_window is None
    for folder in (hf, mcore):
        processor = AutoProcessor.from_pretrained(folder)
        assert AutoConfig.from_pretrained(folder).image_token_index == 300
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        assert text == "<s>[INST] <image>\nWhat is this?[/INST]"
        inputs = processor(images=Image.new("RGB", (40, 30), "red"), text=text, return_tensors="pt")
        assert (inputs.input_ids == 300).sum() == 16
        assert (inputs.input_ids == processor.tokenizer.bos_token_id).sum() == 1
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs.input_ids.shape[1] + 2


def test_bf16_comes_back_bit_exact_and_other_types_are_converted(elsewhere):
    save_llama(elsewhere / "a llama", dtype=torch.bfloat16)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        shards = converted(elsewhere, "auto", "a llama", "a clip", f"{precision} shards", 2, 1, "false", precision)
        back = converted(elsewhere, "auto", shards.name, "none", f"{precision} back", 1, 1, "true", precision)
        shutil.copytree(shards, elsewhere / "described", dirs_exist_ok=True)
        exported = exported_tensors(back)
        for name, tensor in source_tensors(elsewhere, llm="a llama").items():
            found = exported[name]
            assert found.dtype == dtype
            assert torch.equal(found[: len(tensor)], tensor.to(dtype)), name
        config = json.loads((back / "config.json").read_text())
        assert config["torch_dtype"] == config["text_config"]["dtype"] == str(dtype).removeprefix("torch.")


def test_whole_clip_as_bin(elsewhere):
    """The published CLIP checkpoint is a whole CLIPModel, and its weights lie in pytorch_model.bin."""
    folder = elsewhere / "whole clip"
    save_clip(folder)
    tower = HfReader(folder, lambda name: name if name.startswith("vision_model.") else f"vision_model.{name}")
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(vision_config=VISION_SIZES, text_config=text, projection_dim=32))
    whole.config.save_pretrained(folder)
    torch.save({**whole.state_dict(), **tower}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    shards = converted(elsewhere, "auto", "a mistral", "whole clip", "from bin", 2, 1, "false", "fp32")
    vision = json.loads((shards / "config.json").read_text())["vision_config"]
    assert vision["model_type"] == "clip_vision_model"
    assert vision["hidden_size"] == VISION_SIZES["hidden_size"]
    converted(elsewhere, "auto", "from bin", "none", "from bin back", 1, 1, "true", "fp32")
    check_export(elsewhere, "from bin", "from bin back", clip="whole clip")


def test_projector_follows_the_seed(elsewhere):
    def projector(target, *flags):
        shards = converted(elsewhere, "auto", "a mistral", "a clip", target, 1, 1, "false", "fp32", "none", *flags)
        content = torch.load(shards / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)
        return content["model"]["vision_projection.encoder.linear_fc1.weight"]

    first, again, other = projector("seed a"), projector("seed b"), projector("seed c", "--seed", "7")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_export_of_a_checkpoint_that_carries_nothing(elsewhere, mcore, hf):
    """Config and tokenizer come from HF_CKPT_PATH, the tower's last layer from CLIP."""
    bare = elsewhere / "bare"
    bare.mkdir()
    shutil.copy(mcore / "latest_checkpointed_iteration.txt", bare)
    shutil.copytree(mcore / "release", bare / "release")

    refused = convert(elsewhere, "auto", "bare", "none", "bare back", 1, 1, "true", "fp32")
    assert "bare: has no config.json; give --hf-ckpt-path" in refused.stderr
    llava = shutil.copytree(hf, elsewhere / "a llava")
    shutil.copy(mcore / "config.json", llava)  # hf's own has more rows in its vocabulary
    refused = convert(elsewhere, "auto", "bare", "none", "bare back", 1, 1, "true", "fp32", "a llava")
    assert "unused.safetensors: missing" in refused.stderr
    back = converted(elsewhere, "auto", "bare", "a clip", "bare back", 1, 1, "true", "fp32", "a llava")
    assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert (back / "tokenizer.json").exists()


def test_unused_tensors_are_beside_the_shards(mcore):
    names = load_file(mcore / "unused.safetensors")
    assert len(names) == 18
    assert all(".layers.2." in name or ".post_layernorm." in name for name in names)


PUBLISHED = ("auto", "a mistral", "a clip", "refused", 2, 1, "false", "fp32")


def changed(position: int, value: object) -> tuple:
    return (*PUBLISHED[:position], value, *PUBLISHED[position + 1 :])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (changed(0, "7B"), "--model-size 7B: the language model's config.json describes"),
        (changed(0, "big"), "--model-size big: expected a size such as 7B"),
        (changed(1, "no model"), "no model/config.json: missing"),
        (changed(1, "a clip"), "a clip/config.json: language model: model_type 'clip_vision_model' is not supported"),
        (changed(2, "no clip"), "no clip/config.json: missing"),
        (changed(2, "none"), "--source-clip-ckpt-path none: a vision tower's folder is needed"),
        (changed(3, "a mistral"), "a mistral: and a mistral, which is read, lie in each other"),
        (changed(3, ""), "--target-ckpt-path an empty path"),
        (
            changed(4, 3),
            "--tensor-model-parallel-size 3: the language model has 4 query groups, which 3 does not divide",
        ),
        (changed(4, "two"), "--tensor-model-parallel-size 'two': expected INT"),
        (changed(4, 0), "--tensor-model-parallel-size 0: expected 1 or more"),
        (changed(5, 3), "--pipeline-model-parallel-size 3: the language model has 4 layers"),
        (changed(6, "yes"), "--mg2hf 'yes': expected true or false"),
        (changed(6, "true"), "latest_checkpointed_iteration.txt: missing; expected the folder of a Megatron-Core"),
        (changed(7, "fp8"), "--precision fp8: weights are kept as bf16, fp16 or fp32"),
        (changed(7, "int4"), "--precision 'int4': expected one of bf16, fp16, fp32"),
        ((*PUBLISHED, "--sed", 7), "--sed: no such flag; did you mean --seed?"),
    ],
)
def test_a_mistake_is_one_line_at_once(elsewhere, arguments, message):
    before = processor_seconds()
    result = convert(elsewhere, *arguments, shell="sh")
    assert processor_seconds() - before < 1.8  # half of it on a quiet machine; torch's import alone takes more
    assert result.returncode != 0
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (elsewhere / "refused").exists()
    assert not (elsewhere / ".refused.partial").exists()


@pytest.mark.parametrize("arguments", [(), PUBLISHED[:7], (*PUBLISHED, "hf", "more")])
def test_wrong_number_of_arguments_shows_the_usage(elsewhere, arguments):
    result = convert(elsewhere, *arguments, shell="sh")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {len(arguments)} arguments given, 8 or 9 expected\n")
    assert "usage: bash hf2mcore_convertor_llava.sh MODEL_SIZE" in result.stderr
    assert "example:" in result.stderr


def test_nothing_is_left_of_a_conversion_that_fails(elsewhere):
    """The tower lacks a tensor: seen when the weights are opened, before anything is written."""
    broken = shutil.copytree(elsewhere / "a clip", elsewhere / "broken clip")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop(next(name for name in tensors if name.endswith("layers.1.mlp.fc1.bias")))
    torch.save(tensors, broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    result = convert(elsewhere, *changed(2, "broken clip"))
    assert result.returncode == 1
    assert "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias is missing" in result.stderr
    assert not (elsewhere / "refused").exists()
    assert not (elsewhere / ".refused.partial").exists()
