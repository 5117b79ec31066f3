"""What a checkpoint is, of every format, without reading a weight."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_patch.conversion import summary
from megatron_patch.conversion.commands import main as convert
from megatron_patch.conversion.inspect_checkpoint import main
from megatron_patch.conversion.summary import summarize
from megatron_patch.tensor_io import disk


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch):
    def read(*arguments: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(disk.InputFile, "read", read)


def test_shards(mcore, tmp_path):
    facts = summarize(mcore)
    assert facts["format"] == "Megatron-Core, mp_rank shards"
    assert facts["iteration"] == "release"
    assert facts["parallel sizes"].startswith("TP 2 x PP 1")
    assert "model.safetensors" in facts["manifest"]
    assert "megatron-patch-llava" in facts["manifest"]
    assert facts["model"] == "llava"
    assert facts["language model"].startswith("mistral, 0.00 billion parameters: 4 layers of 96, 12 heads in 4 groups")
    assert facts["vision tower"].startswith("clip_vision_model: 2 layers used, of 64; images of 28 pixels")
    assert "float32" in facts["tensors"]
    assert facts["size"].endswith("in 2 files")
    assert {**summarize(mcore / "release"), "iteration": "release"} == facts
    copy = shutil.copytree(mcore, tmp_path / "copy")
    (copy / "release" / "manifest.json").unlink()
    assert summarize(copy)["manifest"].startswith("none")


@pytest.fixture(scope="module")
def dist(mcore, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("dist") / "dist"
    flags = {"source-llm-ckpt-path": mcore, "target-ckpt-path": target, "ckpt-format": "torch_dist"}
    assert convert([f"--{name}={value}" for name, value in flags.items()]) == 0
    return target


def test_torch_dist(dist):
    facts = summarize(dist)
    assert facts["format"] == "Megatron-Core, torch_dist"
    assert "mp_rank_00/model_optim_rng.pt" in facts["manifest"]
    assert "beside the model" not in facts


def test_hugging_face(mistral, clip, hf):
    facts = summarize(mistral)
    assert facts["format"] == "Hugging Face, safetensors"
    assert facts["model"] == "mistral"
    assert "12 heads in 4 groups" in facts["language model"]
    assert int(facts["values"].split(" ")[0].replace(",", "")) * 4 < (mistral / "model.safetensors").stat().st_size
    assert summarize(clip)["vision tower"].startswith("clip_vision_model")
    assert summarize(hf)["model"] == "llava"


def test_what_is_no_checkpoint(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert (
        f"error: {tmp_path}: holds no weights; expected one of model.safetensors, model.safetensors.index.json, "
        "pytorch_model.bin, pytorch_model.bin.index.json; or of Megatron-Core: latest_checkpointed_iteration.txt"
    ) in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 1
    assert "not a folder" in capsys.readouterr().err
    assert main([]) == 2


def test_another_model(mistral, tmp_path):
    shutil.copytree(mistral, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text('{"model_type": "other"}')
    assert summarize(tmp_path / "copy")["model"] == "other, which no table here describes"
    assert summary.KINDS


def test_as_a_program(mcore, capsys):
    assert main([str(mcore)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "format          Megatron-Core, mp_rank shards"
    assert any(line.startswith("size ") for line in lines)
