"""What the converter takes besides a language model and a CLIP, and what it gives besides a LLaVA."""

from __future__ import annotations

import contextlib
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
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    pipeline,
)

from megatron_patch.conversion.commands import main
from megatron_patch.conversion.companions import read_json, write_json
from megatron_patch.conversion.summary import summarize
from megatron_patch.data.tokenize import load_tokenizer
from megatron_patch.families.llava import hub_name, read_config
from megatron_patch.stores.hf import HfReader
from megatron_patch.stores.mm_projector import NAMES
from megatron_patch.tensor_io import disk
from tests.tiny import LANGUAGE_MODELS

EMBED_TOKENS = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"


def run(target: Path, **flags: object) -> int:
    named = {"target_ckpt_path": target, "precision": "fp32", "verify": "false", **flags}
    return main([f"--{name.replace('_', '-')}={value}" for name, value in named.items()])


def convert(target: Path, **flags: object) -> Path:
    assert run(target, **flags) == 0
    return target


def weights(folder: Path) -> HfReader:
    return HfReader(folder, partial(hub_name, read_config(folder)))


def hub(name: str) -> str:
    return name


def transformers_5(name: str) -> str:
    """As modules are called since 4.52, which some checkpoints on the hub were saved as."""
    if name == LM_HEAD:
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.").replace("vision_model.", "")


@pytest.mark.parametrize("spelling", [hub, transformers_5])
def test_a_whole_llava_comes_back_as_it_was(tmp_path, hf, spelling):
    """Tower, projector and language model of one folder, image token and rows for it included."""
    source = shutil.copytree(hf, tmp_path / "llava")
    tensors = {spelling(name): tensor for name, tensor in load_file(hf / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    cut = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    shards = convert(tmp_path / "shards", source_llm_ckpt_path=source, verify="true", **cut)
    back = convert(tmp_path / "back", mg2hf="true", source_llm_ckpt_path=shards)
    expected, found = weights(hf), weights(back)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (shards / "chat_template.jinja").read_text() == (hf / "chat_template.jinja").read_text()
    assert AutoProcessor.from_pretrained(back).image_token_id == read_json(hf)["image_token_index"] == 300


@pytest.fixture(scope="module")
def repository(tmp_path_factory, clip):
    """A checkpoint of the LLaVA repository."""
    folder = LANGUAGE_MODELS["llama 2"](tmp_path_factory.mktemp("repository") / "llava")
    text, tower, tensors = read_json(folder), read_json(clip), load_file(folder / "model.safetensors")
    for name, named in NAMES.items():
        width = tower["hidden_size"] if "linear_1" in named else text["hidden_size"]
        tensors[name] = torch.randn(text["hidden_size"], *([width] if named.endswith("weight") else []))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    own = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_tower": "some/clip"}
    settings = {**own, "mm_hidden_size": tower["hidden_size"], "image_aspect_ratio": "pad"}
    write_json(folder, "config.json", {**text, **settings, "model_type": "llava_llama"})
    return folder


def test_a_llava_of_its_own_repository(tmp_path, repository, clip):
    mcore = convert(tmp_path / "mcore", source_llm_ckpt_path=repository, source_clip_ckpt_path=clip)
    back = convert(tmp_path / "back", source_llm_ckpt_path=mcore, mg2hf="true")
    before, after = load_file(repository / "model.safetensors"), weights(back)
    assert all(torch.equal(after[hub], before[name]) for name, hub in NAMES.items())
    pixels = read_json(mcore, "preprocessor_config.json")
    assert (pixels["image_processor_type"], pixels["do_pad"]) == ("LlavaImageProcessor", True)
    assert "USER: " in (mcore / "chat_template.jinja").read_text()
    assert read_json(mcore, "conversion.json")["projector"] == str(repository)
    assert summarize(repository)["model"] == "llava_llama of the LLaVA repository, with some/clip for its tower"


@pytest.mark.parametrize(
    ("said", "flags", "message"),
    [
        ({}, {"source_clip_ckpt_path": "none"}, "of the LLaVA repository, with some/clip for its tower"),
        ({"mm_vision_select_layer": -1}, {}, "mm_vision_select_layer is -1; of the LLaVA repository's only -2"),
        ({"mm_hidden_size": 1024}, {}, "this LLaVA was trained on 'some/clip' of width 1024, give that one's folder"),
        ({"model_type": "llava_mpt"}, {}, "model_type is 'llava_mpt', of the LLaVA repository's only llava_llama"),
        ({}, {"projector": "mm_projector.bin"}, "is a whole LLaVA and has its own; give none"),
    ],
)
def test_a_llava_of_its_own_repository_that_does_not_fit(tmp_path, capsys, repository, clip, said, flags, message):
    source = shutil.copytree(repository, tmp_path / "llava")
    write_json(source, "config.json", {**read_json(source), **said})
    given = {"source_llm_ckpt_path": source, "source_clip_ckpt_path": clip, **flags}
    assert run(tmp_path / "mcore", **given) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["import", "reshard", "export"])
def test_a_target_within_a_source(tmp_path, capsys, mistral, clip, mcore, kind):
    source = shutil.copytree(mistral if kind == "import" else mcore, tmp_path / "source")
    flags = {"import": {"source_clip_ckpt_path": clip}, "export": {"mg2hf": "true"}}.get(kind, {})
    assert run(source / "target", source_llm_ckpt_path=source, **flags) == 1
    assert "lie in each other; give a folder apart from it" in capsys.readouterr().err
    assert not (source / "target").exists()


@pytest.mark.parametrize("flags", [{}, {"mg2hf": "true"}, {"mg2hf": "true", "parts": "projector"}], ids=str)
def test_a_checkpoint_that_changes_meanwhile(tmp_path, capsys, monkeypatch, mcore, flags):
    source = shutil.copytree(mcore, tmp_path / "mcore")
    path = next((source / "release").rglob("*.pt"))
    monkeypatch.setattr(disk, "reached", lambda point: os.utime(path, (1, 1)) if point == "locked" else None)
    assert run(tmp_path / "target", source_llm_ckpt_path=source, **flags) == 1
    assert f"{path}: changed while it was read" in capsys.readouterr().err
    assert [folder.name for folder in tmp_path.iterdir()] == ["mcore"]


def test_no_python_file_is_named_in_what_is_written(tmp_path, mistral, clip, mcore):
    llm, tower, old = (shutil.copytree(source, tmp_path / source.name) for source in (mistral, clip, mcore))
    named = {"auto_map": {"AutoModel": "mine.Model"}}
    settings = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
    for folder in (llm, tower, old):
        for path in (path for name in (*settings, "tokenizer_config.json") for path in folder.rglob(name)):
            write_json(path.parent, path.name, {**read_json(path.parent, path.name), **named})
    new = convert(tmp_path / "new", source_llm_ckpt_path=llm, source_clip_ckpt_path=tower)
    back = convert(tmp_path / "back", source_llm_ckpt_path=old, mg2hf="true", parts="true")
    written = [path for folder in (new, back) for path in folder.rglob("*.json")]
    assert [path for path in written if "auto_map" in path.read_text()] == []


def test_weights_that_are_passed_over_are_named(tmp_path, capsys, mistral, clip):
    source = shutil.copytree(mistral, tmp_path / "llm")
    (source / "pytorch_model.bin").write_bytes(b"of an earlier save")
    convert(tmp_path / "mcore", source_llm_ckpt_path=source, source_clip_ckpt_path=clip)
    said = f"{source}: model.safetensors is the model, as for transformers; pytorch_model.bin is not read\n"
    assert said in capsys.readouterr().out


def test_a_llava_of_the_hub_with_its_own_template(tmp_path, hf):
    """Sizes that LlavaConfig repeats, a template in chat_template.json, a tokenizer that begins sequences itself."""
    source = shutil.copytree(hf, tmp_path / "llava")
    write_json(source, "config.json", {**read_json(source), "vocab_size": 320, "ignore_index": -100})
    (source / "chat_template.jinja").unlink()
    write_json(source, "chat_template.json", {"chat_template": "{{ messages[0]['content'] }}"})
    path = source / "tokenizer.json"
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    begins = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
    }
    begins["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": begins}))
    shards = convert(tmp_path / "shards", source_llm_ckpt_path=source)
    assert (shards / "chat_template.jinja").read_text() == "{{- bos_token -}}{{ messages[0]['content'] }}"
    said = convert(tmp_path / "said", source_llm_ckpt_path=source, prompt_format="v1")
    assert "ASSISTANT:" in (said / "chat_template.jinja").read_text()


def test_mm_projector_is_written_and_read(tmp_path, mcore, hf, mistral, clip):
    folder = convert(tmp_path / "alone", mg2hf="true", source_llm_ckpt_path=mcore, parts="projector")
    assert [path.name for path in folder.iterdir()] == ["mm_projector.bin"]
    tensors = torch.load(folder / "mm_projector.bin", weights_only=True)
    assert list(tensors) == [f"model.mm_projector.{i}.{what}" for i in (0, 2) for what in ("weight", "bias")]
    sources = {"source_llm_ckpt_path": mistral, "source_clip_ckpt_path": clip, "seed": 7}
    again = convert(tmp_path / "again", **sources, projector=folder / "mm_projector.bin")
    back = convert(tmp_path / "back", mg2hf="true", source_llm_ckpt_path=again)
    expected, found = weights(hf), weights(back)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parts_are_the_sources_bit_for_bit(tmp_path, mcore, mistral, clip):
    """Every tensor, the language model's config and its tokenizer; transformers loads both."""
    back = convert(tmp_path / "back", mg2hf="true", source_llm_ckpt_path=mcore, parts="true", max_shard_size="500KB")
    assert len(list(back.glob("model-*.safetensors"))) > 2
    for name, source, kind in (
        ("language_model", mistral, AutoModelForCausalLM),
        ("vision_tower", clip, CLIPVisionModel),
    ):
        model, info = kind.from_pretrained(back / name, output_loading_info=True)
        assert not any(info.values()), info
        expected = kind.from_pretrained(source).state_dict()
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(model.state_dict()[key], expected[key]) for key in expected)
        assert read_json(back / name) == read_json(source)
        assert all(path.stat().st_size < 600_000 for path in (back / name).glob("*.safetensors"))
    assert all("vision_model." in key for key in HfReader(back / "vision_tower"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / "language_model" / file).read_bytes() == (mistral / file).read_bytes()
    assert (back / "mm_projector.bin").is_file()
    assert not LlavaForConditionalGeneration.from_pretrained(back, output_loading_info=True)[1]["missing_keys"]


def test_a_part_of_a_checkpoint_without_its_sources_tokenizer(tmp_path, mcore):
    shards = shutil.copytree(mcore, tmp_path / "shards")
    shutil.rmtree(shards / "source_tokenizer")
    back = convert(tmp_path / "back", mg2hf="true", source_llm_ckpt_path=shards, parts="true")
    tokenizer = AutoTokenizer.from_pretrained(back / "language_model")
    assert len(tokenizer) == 300
    assert "<image>" not in tokenizer.get_vocab()


@pytest.mark.parametrize("kind", ["mistral", "qwen 2 tied"])
def test_added_tokens_get_mean_rows(tmp_path, clip, kind):
    source = LANGUAGE_MODELS[kind](tmp_path / "source")
    sources = {"source_llm_ckpt_path": source, "source_clip_ckpt_path": clip}
    shards = convert(tmp_path / "shards", **sources, tensor_model_parallel_size=2, add_tokens="neva", verify="true")
    assert read_config(shards).language.vocab_size == 311
    back = convert(tmp_path / "back", mg2hf="true", source_llm_ckpt_path=shards, parts="true", verify="true")
    names = ["<image>", "<im_start>", "<im_end>", *(f"<extra_id_{i}>" for i in range(8))]
    for folder in (shards, back, back / "language_model"):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.convert_tokens_to_ids(names) == list(range(300, 311))
        assert tokenizer("a<im_end>b").input_ids.count(302) == 1
    before, after = load_file(source / "model.safetensors"), weights(back)
    tables = [name for name in (EMBED_TOKENS, LM_HEAD) if name in after]
    assert len(tables) == (1 if "tied" in kind else 2)
    for name in tables:
        table = before[name.removeprefix("language_model.")]
        assert torch.equal(after[name][:300], table)
        assert torch.allclose(after[name][300:], table.mean(0, keepdim=True).expand(11, -1), atol=1e-6)
    # Once there, they are the model's: converted again, nothing is added.
    again = convert(tmp_path / "again", source_llm_ckpt_path=back, add_tokens="<im_start>,<im_end>")
    assert read_config(again).language.vocab_size == 311


def test_an_export_stops_where_its_prompt_format_ends_an_answer(tmp_path, mistral, clip):
    sources = {"source_llm_ckpt_path": mistral, "source_clip_ckpt_path": clip}
    chatml = {"add_tokens": "<|im_start|>,<|im_end|>", "prompt_format": "chatml"}
    mcore = convert(tmp_path / "mcore", **sources, **chatml)
    back = convert(tmp_path / "back", source_llm_ckpt_path=mcore, mg2hf="true")
    tokenizer = load_tokenizer(back)
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    for settings in (read_json(back, "generation_config.json"), read_json(back), read_json(back)["text_config"]):
        assert settings["eos_token_id"] == ends


def test_a_tokenizer_of_an_earlier_version_is_exported_as_todays(tmp_path, mcore):
    source = shutil.copytree(mcore, tmp_path / "mcore")
    before = read_json(source, "tokenizer_config.json")
    write_json(source, "tokenizer_config.json", {**before, "padding_side": "right"})
    back = convert(tmp_path / "back", source_llm_ckpt_path=source, mg2hf="true")
    assert load_tokenizer(back).padding_side == "left"


def test_pipeline_answers_a_batch_as_each_prompt_alone(hf):
    ask = pipeline("image-text-to-text", model=str(hf), dtype="float32")
    image = {"type": "image", "image": Image.new("RGB", (40, 30), "red")}
    questions = [
        [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
        for text in ("Hi", "What is it that you see in this picture?")
    ]
    options = {"max_new_tokens": 4, "return_full_text": False}
    together = [answer[0]["generated_text"] for answer in ask(text=questions, batch_size=2, **options)]
    assert together == [ask(text=question, **options)[0]["generated_text"] for question in questions]


@pytest.mark.skipif("TRANSFORMERS_4" not in os.environ, reason="TRANSFORMERS_4 names no folder with transformers 4.57")
def test_transformers_4_opens_an_export(hf):
    """In a process of its own. The folder: `pip install --target FOLDER transformers==4.57.*`, without its torch."""
    script = (
        "import sys, transformers as t; assert t.__version__.startswith('4.'), t.__version__\n"
        "model, info = t.LlavaForConditionalGeneration.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "assert model.config.text_config.rope_theta == 500000.0\n"
        "tokenizer = t.AutoProcessor.from_pretrained(sys.argv[1]).tokenizer\n"
        "assert tokenizer('<image>').input_ids == [300]\n"
        "model.generate(**tokenizer('Hi', return_tensors='pt'), max_new_tokens=1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.environ["TRANSFORMERS_4"]}
    result = subprocess.run([sys.executable, "-c", script, hf], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_model_card(hf, mistral, clip):
    card = (hf / "README.md").read_text()
    parity = read_json(hf, "parity.json")
    facts = [
        f"| {mistral.name} |",
        f"| {clip.name} |",
        "new, seed 1234",
        "id 300",
        "fp32",
        "4 layers of 96",
        "transformers 5",
    ]
    facts += ["100.00% of the positions", f"{parity['logits_max_abs_difference']:.3g}"]
    for fact in facts:
        assert fact in card, fact
    assert str(mistral.parent) not in card
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")


def test_a_tied_source_that_holds_another_output_layer(tmp_path, capsys, clip):
    source = LANGUAGE_MODELS["qwen 2 tied"](tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    sources = {"source_llm_ckpt_path": source, "source_clip_ckpt_path": clip}
    save_file({**tensors, "lm_head.weight": table.clone()}, source / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "same", **sources)
    save_file({**tensors, "lm_head.weight": table + 1}, source / "model.safetensors", metadata={"format": "pt"})
    assert run(tmp_path / "other", **sources) == 1
    assert (
        "the output layer is not the embedding, though config.json says tie_word_embeddings" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"source_llm_ckpt_path": "hf", "source_clip_ckpt_path": "clip"},
            "is a whole LLaVA and has its own; give none",
        ),
        ({"source_llm_ckpt_path": "hf", "projector": "x.bin"}, "--projector x.bin: "),
        (
            {"source_llm_ckpt_path": "mistral"},
            "--source-clip-ckpt-path none: a vision tower's folder is needed, since ",
        ),
        (
            {"source_llm_ckpt_path": "mistral", "source_clip_ckpt_path": "clip", "projector": "x"},
            "x: no such file; exp",
        ),
        ({"source_llm_ckpt_path": "mcore", "add_tokens": "neva"}, "--add-tokens neva: is for an import"),
        ({"source_llm_ckpt_path": "mcore", "verify": "true"}, "--verify true: is for conversions from and to Hugging"),
        (
            {"source_llm_ckpt_path": "mcore", "mg2hf": "true", "parts": "projector", "verify": "true"},
            "--verify true: there is no whole model to verify",
        ),
        ({"source_llm_ckpt_path": "mcore", "mg2hf": "true", "projector": "x"}, "--projector x: is for --mg2hf false"),
        ({"source_llm_ckpt_path": "mcore", "mg2hf": "true", "ckpt_format": "torch_dist"}, "is for --mg2hf false"),
        (
            {"source_llm_ckpt_path": "mcore", "ckpt_format": "torch_dist", "tensor_model_parallel_size": 2},
            "--tensor-model-parallel-size 2: a torch_dist checkpoint is not sharded; use 1",
        ),
        ({"source_llm_ckpt_path": "mistral", "parts": "true"}, "--parts true: is for --mg2hf true"),
        ({"source_llm_ckpt_path": "mistral", "max_shard_size": "1GB"}, "--max-shard-size 1GB: is for --mg2hf true"),
        ({"source_llm_ckpt_path": "hf", "hf_ckpt_path": "x"}, "--hf-ckpt-path x: is for a Megatron-Core checkpoint"),
        ({"source_llm_ckpt_path": "hf", "no_check": "true"}, "--no-check True: is for a Megatron-Core checkpoint"),
        ({"source_llm_ckpt_path": "mcore", "source_clip_ckpt_path": "x"}, "--source-clip-ckpt-path x: is for an imp"),
        ({"source_llm_ckpt_path": "mcore", "prompt_format": "v1"}, "--prompt-format v1: is for an import"),
        ({"source_llm_ckpt_path": "mcore", "seed": 7}, "--seed 7: is for an import"),
        ({"source_llm_ckpt_path": "mcore", "hf_ckpt_path": "x"}, "--hf-ckpt-path x: no such folder; leave it out"),
        ({"source_llm_ckpt_path": "mcore", "mg2hf": "true", "seed": 7}, "--seed 7: is for --mg2hf false"),
        (
            {"source_llm_ckpt_path": "mcore", "mg2hf": "true", "source_clip_ckpt_path": "x"},
            "--source-clip-ckpt-path x: no such folder; leave it out",
        ),
        (
            {"source_llm_ckpt_path": "mcore", "mg2hf": "true", "max_shard_size": "5"},
            "--max-shard-size 5: expected a size",
        ),
    ],
)
def test_options_that_do_not_fit(tmp_path, capsys, request, flags, message):
    named = ("hf", "mistral", "clip", "mcore")
    flags = {key: request.getfixturevalue(value) if value in named else value for key, value in flags.items()}
    capsys.readouterr()  # what the fixtures said
    with contextlib.suppress(SystemExit):
        assert run(tmp_path / "x", **flags) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "x").exists()
