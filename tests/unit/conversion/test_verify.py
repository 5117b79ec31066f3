"""The proof itself: what is equal passes, and what is not is found at the block where it is."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from megatron_patch.conversion import plan
from megatron_patch.conversion.commands import main
from megatron_patch.conversion.plan import open_mcore, to_hf
from megatron_patch.conversion.verify import stream_weights, verify
from megatron_patch.families.llava import read_config, rows
from megatron_patch.stores.hf import load_safetensors
from megatron_patch.stores.reader import InMemory

QKV = "language_model.decoder.layers.2.self_attention.linear_qkv.weight"


def compare(mcore_folder, changed):
    """A checkpoint and itself, with `changed` tensors on megatron.core's side."""
    llava = read_config(mcore_folder)
    mcore = dict(open_mcore(mcore_folder, llava))
    hf = {**to_hf(rows(llava), InMemory(mcore, "")), **load_safetensors(mcore_folder / "unused.safetensors")}
    prompt = torch.tensor([[5, *[llava.image_token_id] * 16, 40, 41, 42, 43]])
    config = json.loads((mcore_folder / "config.json").read_text())
    other = InMemory({**mcore, **{name: change(mcore[name].clone()) for name, change in changed.items()}}, "")
    return verify(llava, config, InMemory(hf, ""), other, prompt, torch.float32, torch.device("cpu"))


def test_equal_models(mcore, one_process):
    parity = compare(mcore, {})
    assert parity.first_divergence is None
    names = [block.name for block in parity.blocks]
    vision = ["vision_model.embedding", "vision_model.layers.0", "vision_model.layers.1", "vision_projection"]
    language = [
        f"language_model.{part}" for part in ("embedding", *(f"layers.{i}" for i in range(4)), "final_layernorm")
    ]
    assert names == [*vision, *language, "logits"]
    assert all(block.max_abs_difference <= 1e-5 and block.cosine > 0.999999 for block in parity.blocks)
    assert parity.top1_agreement == 1


@pytest.mark.parametrize(
    ("name", "change", "block"),
    [
        # The first two query heads change places: a layout that is wrong, and can be undone.
        (QKV, lambda qkv: torch.cat([qkv[16:32], qkv[:16], qkv[32:]]), "language_model.layers.2"),
        ("vision_model.class_token", lambda token: -token, "vision_model.embedding"),
        ("vision_model.decoder.layers.1.mlp.linear_fc2.bias", lambda bias: bias + 0.01, "vision_model.layers.1"),
        ("vision_projection.encoder.linear_fc2.weight", lambda weight: weight.flip(0), "vision_projection"),
        ("language_model.embedding.word_embeddings.weight", lambda table: table.roll(1, 0), "language_model.embedding"),
        ("language_model.decoder.final_layernorm.weight", lambda w: w * torch.nan, "language_model.final_layernorm"),
        ("language_model.output_layer.weight", lambda table: table.roll(1, 0), "logits"),
    ],
)
def test_the_first_block_that_diverges_is_named(mcore, one_process, name, change, block):
    parity = compare(mcore, {name: change})
    assert parity.first_divergence.name == block
    report = json.loads(json.dumps(parity.to_dict(), allow_nan=False))
    assert (report["equal"], report["first_divergence"]) == (False, block)


def test_a_conversion_that_is_wrong_leaves_only_its_report(tmp_path, capsys, monkeypatch, mistral, clip):
    """Query, key and value one after the other, instead of group by group: the shapes are right, the model is not."""
    merge = plan.merge

    def wrong(weight, tensors):
        is_qkv = weight.layout == "qkv" and weight.mcore.startswith("language_model.")
        return type(tensors[0]).cat(tensors) if is_qkv else merge(weight, tensors)

    monkeypatch.setattr(plan, "merge", wrong)
    flags = {"source-llm-ckpt-path": mistral, "source-clip-ckpt-path": clip, "target-ckpt-path": tmp_path / "out"}
    assert main([f"--{name}={value}" for name, value in flags.items()]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {tmp_path / 'out'}: not written, since its model diverges")
    assert "at language_model.layers.0 (" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out.parity.json"]
    report = tmp_path / "out.parity.json"
    assert json.loads(report.read_text())["first_divergence"] == "language_model.layers.0"
    report.write_text('{"mine": 1}')
    assert main([f"--{name}={value}" for name, value in flags.items()]) == 1
    assert "out.parity.json: is there, and not written by this command" in capsys.readouterr().err
    assert report.read_text() == '{"mine": 1}'


def test_weights_are_there_only_while_they_are_used():
    """A module's own weights, from its call to its return; one that stays is read once more when it is called again."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    judge = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    there = []

    def load(name):
        there.append((name, [name for name, weight in model.named_parameters() if not weight.is_meta]))
        return judge.state_dict()[name]

    stream_weights(model, load)
    assert torch.equal(model(torch.ones(1, 3)), judge(torch.ones(1, 3)))
    assert there == [
        (f"{i}.{what}", [f"{i}.weight"] * (what == "bias")) for i in range(3) for what in ("weight", "bias")
    ]
    assert all(weight.is_meta for weight in model.parameters())
